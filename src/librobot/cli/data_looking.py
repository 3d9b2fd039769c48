"""The commands of librobot-data that only read: info, stats, check, inspect."""

from __future__ import annotations

import argparse
from typing import Any

FORMATS = (
    "lerobot, hdf5, libero, aloha, zarr, webdataset, mcap, rlds or oxe_*; default: what its files look like"
)


def add(commands: Any) -> None:
    for name, text in (("info", "robot, cameras, episodes, tasks"), ("stats", "ranges of its vectors")):
        command = commands.add_parser(name, help=f"{text} of a LeRobotDataset")
        command.add_argument("root", metavar="DIR", help="the folder that holds meta/info.json")
        command.set_defaults(run=print_about)
    check = commands.add_parser("check", help="find what is wrong with a dataset; exit code 3 for findings")
    check.add_argument("--pictures", type=int, default=3, help="how many of each episode are looked at")
    add_source(check)
    add_options(check)
    check.set_defaults(run=print_findings)
    page = commands.add_parser("inspect", help="a page with videos, curves, statistics and problems")
    add_source(page)
    page.add_argument("page", metavar="OUT.html", help="the page, all in one file")
    page.add_argument("--episodes", metavar="0,3,9", help="those to show; default: six, evenly spread")
    page.add_argument("--pictures", type=int, default=3, help="how many of each episode are looked at")
    add_options(page)
    page.set_defaults(run=write_inspection)


def add_source(command: argparse.ArgumentParser) -> None:
    """The one dataset that a command reads; its KEY=VALUE options come last."""
    command.add_argument("root", metavar="SRC", help="the dataset's folder or file")
    command.add_argument("--from", dest="format", metavar="FORMAT", help=FORMATS)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of the source: layout=libero")


def print_about(given: argparse.Namespace) -> None:
    from librobot.data import inspect

    (inspect.print_info if given.command == "info" else inspect.print_stats)(given.root)


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

    words = (given.episodes or "").split(",")
    if given.episodes and not all(word.strip().isdigit() for word in words):
        raise LibrobotError(f"--episodes: expected numbers such as 0,3,9, found {given.episodes!r}")
    episodes = [int(word) for word in words] if given.episodes else None
    source = open_source(given.root, given.format, given.options)
    page = write_page(source, given.page, episodes=episodes, pictures=given.pictures)
    print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")
