"""librobot-data: look into datasets, check, convert, merge, split and filter them."""

from __future__ import annotations

import argparse

from librobot.cli import data_editing, data_looking, data_writing
from librobot.cli.app import start


def parser() -> argparse.ArgumentParser:
    """Every command's parser sets `run`, which takes the parsed arguments."""
    root = argparse.ArgumentParser("librobot-data", description="Look into datasets and write them anew.")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = root.add_subparsers(dest="command", required=True)
    data_looking.add(commands)
    data_writing.add(commands)
    data_editing.add(commands)
    return root


def command() -> object:
    given, rest = parser().parse_known_args()
    if unknown := [
        word for word in rest if word.startswith("-") or "=" not in word or "options" not in given
    ]:
        parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # argparse takes those before the first --option only
        given.options = [*given.options, *rest]
    return given.run(given)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
