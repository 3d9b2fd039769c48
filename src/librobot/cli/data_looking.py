"""The commands of librobot-data that only read: info, stats, check, inspect."""

from __future__ import annotations

import argparse
from typing import Any

from librobot.cli.data_arguments import add_options, add_source


def add(commands: Any) -> None:
    for name, text in (("info", "robot, cameras, episodes, tasks"), ("stats", "ranges of its vectors")):
        command = commands.add_parser(name, help=f"{text} of a LeRobotDataset")
        command.add_argument("root", metavar="DIR", help="the folder that holds meta/info.json")
        command.set_defaults(run=print_about)
    check = commands.add_parser("check", help="find what is wrong with a dataset; exit code 3 for findings")
    page = commands.add_parser("inspect", help="a page with videos, curves, statistics and problems")
    for command, run in ((check, print_findings), (page, write_inspection)):
        command.add_argument("--pictures", type=int, default=3, help="how many of each episode are looked at")
        add_source(command)
        if command is page:
            page.add_argument("page", metavar="OUT.html", help="the page, all in one file")
            page.add_argument(
                "--episodes", metavar="0,3,9", help="those to show; default: six, evenly spread"
            )
        add_options(command)
        command.set_defaults(run=run)


def print_about(given: argparse.Namespace) -> None:
    from librobot.data.inspect import print_info, print_stats

    (print_info if given.command == "info" else print_stats)(given.root)


def print_findings(given: argparse.Namespace) -> None:
    from librobot.config.build import open_source
    from librobot.data.check import check

    findings = check(open_source(given.root, given.format, given.options), pictures=given.pictures)
    print("\n".join(map(str, findings)) or "nothing found")
    raise SystemExit(3 if findings else 0)


def write_inspection(given: argparse.Namespace) -> None:
    from librobot.config.build import open_source
    from librobot.data.page import write_page
    from librobot.errors import LibrobotError

    episodes = given.episodes.split(",") if given.episodes else []
    if not all(word.strip().isdigit() for word in episodes):
        raise LibrobotError(f"--episodes: expected numbers such as 0,3,9, found {given.episodes!r}")
    source, shown = open_source(given.root, given.format, given.options), [int(word) for word in episodes]
    page = write_page(source, given.page, episodes=shown or None, pictures=given.pictures)
    print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")
