"""The commands of librobot-data that write a dataset anew: convert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from librobot.cli.data_arguments import add_options, add_source

TARGETS = ("lerobot", "rlds", "hdf5", "zarr", "webdataset")


def add(commands: Any) -> None:
    command = commands.add_parser("convert", help="write a dataset in another format")
    command.add_argument("--to", required=True, choices=TARGETS)
    command.add_argument(
        "--video", action="store_true", help="lerobot: encode pictures; else all pixels stay"
    )
    command.add_argument("--jpeg", type=int, metavar="QUALITY", help="rlds, hdf5, webdataset: JPEG, not PNG")
    command.add_argument("--fps", type=int, help="lerobot: where the source's rate is no whole number")
    command.add_argument("--prompt", help="the instruction of every episode, instead of the source's")
    command.add_argument("--cut", action="store_true", help="an episode for each stretch of one instruction")
    add_source(command)
    command.add_argument("target", metavar="DST", help="the new folder")
    add_options(command)
    command.set_defaults(run=convert)


def convert(given: argparse.Namespace) -> Path:
    from librobot.config.build import open_source
    from librobot.data.convert import convert

    source = open_source(given.root, given.format, given.options)
    options = {name: getattr(given, name) for name in ("video", "jpeg", "fps", "prompt", "cut")}
    return convert(source, given.target, given.to, **options)
