"""librobot-data: what is in a dataset."""

from __future__ import annotations

import argparse

from librobot.cli.app import start


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("librobot-data", description="Look at a LeRobotDataset v3.0.")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = root.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "robot, cameras, episodes, tasks"),
        ("stats", "ranges of states and actions"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("root", metavar="DIR", help="the folder that holds meta/info.json")
    return root


def command() -> None:
    arguments = parser().parse_args()
    from librobot.data import inspect

    {"info": inspect.print_info, "stats": inspect.print_stats}[arguments.command](arguments.root)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
