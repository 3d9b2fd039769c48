"""The commands of librobot-data that put episodes together anew: merge, split, filter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from librobot.cli.data_arguments import add_options, add_source

FILTERS = ("episodes", "drop", "instruction", "not_instruction", "min_length", "max_length", "clean")


def add(commands: Any) -> None:
    merge = commands.add_parser("merge", help="several datasets of one robot as one LeRobotDataset")
    merge.add_argument("roots", nargs="+", metavar="SRC", help="two or more datasets")
    merge.add_argument("--from", dest="format", metavar="FORMAT", help="default: what the files look like")
    split = commands.add_parser("split", help="DST/train, DST/val and DST/test, by episodes")
    add_source(split)
    for name in ("val", "test"):
        split.add_argument(f"--{name}", type=float, help="share of the episodes, or how many from 1 on")
    split.add_argument("--seed", type=int, default=0, help="of the episodes drawn")
    choose = commands.add_parser("filter", help="some of a dataset's episodes")
    add_source(choose)
    choose.add_argument("--episodes", metavar="0:50,60", help="those to keep, numbers and ranges")
    choose.add_argument("--drop", metavar="7,9", help="those to leave out")
    text = "keep those with this text in an instruction; may be given again: any of them"
    choose.add_argument("--instruction", action="append", default=[], metavar="TEXT", help=text)
    choose.add_argument("--not-instruction", action="append", default=[], metavar="TEXT", help="leave out")
    choose.add_argument("--min-length", type=int, metavar="FRAMES")
    choose.add_argument("--max-length", type=int, metavar="FRAMES")
    choose.add_argument("--clean", action="store_true", help="leave out those in which check finds something")
    for command in (merge, split, choose):
        command.add_argument("target", metavar="DST", help="the new folder")
        text = "decode and write anew, only cameras, states, actions and instructions"
        command.add_argument("--rewrite", action="store_true", help=text)
        command.add_argument("--video", action="store_true", help="encode what is written anew; else PNG")
        if command is not merge:
            add_options(command)
        command.set_defaults(run=run)


def run(given: argparse.Namespace) -> Path:
    from librobot.config.build import open_source
    from librobot.data import editing

    roots = given.roots if given.command == "merge" else [given.root]
    sources = [open_source(root, given.format, getattr(given, "options", ())) for root in roots]
    if given.command == "merge":
        parts = editing.merged(sources)
    elif given.command == "split":
        shares = {name: getattr(given, name) for name in ("val", "test")}
        parts = editing.split(sources[0], {n: s for n, s in shares.items() if s is not None}, given.seed)
    else:
        parts = editing.filtered(sources[0], **{name: getattr(given, name) for name in FILTERS})
    return editing.write_parts(parts, given.target, rewrite=given.rewrite, video=given.video)
