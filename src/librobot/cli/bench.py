"""librobot-bench: measure one thing side by side with a peer or a bare loop."""

from __future__ import annotations

import argparse
import importlib
import pkgutil

import librobot.bench
from librobot.cli.app import start
from librobot.errors import LibrobotError, nearest


def names() -> list[str]:
    """The measurements: the modules of librobot.bench that do not start with an underscore."""
    return [m.name for m in pkgutil.iter_modules(librobot.bench.__path__) if not m.name.startswith("_")]


def command() -> None:
    parser = argparse.ArgumentParser(
        "librobot-bench",
        description="Measure one thing beside a peer or a bare loop; writes outputs/bench/NAME.json.",
        epilog="librobot-bench NAME --help lists the options of NAME. --debug: errors with a traceback.",
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(names()))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the measurement")
    arguments = parser.parse_args()
    if arguments.name not in names():
        raise LibrobotError(f"librobot-bench {arguments.name}: unknown; {nearest(arguments.name, names())}")
    importlib.import_module(f"librobot.bench.{arguments.name}").main(arguments.options)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
