"""librobot-sweep-report: table and plots of a sweep, from its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from librobot.cli.app import start


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "librobot-sweep-report",
        description="Write a sweep's table and plots into DIR/report; while it runs, what there is so far.",
        epilog="librobot-sweep-report outputs/sweep\n"
        "librobot-sweep-report outputs/multirun/2026-11-25/12-00-00 --objective train/loss",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument(
        "folder", metavar="DIR", help="the sweep's folder: its run_dir, or below outputs/multirun"
    )
    root.add_argument("--objective", metavar="METRIC", help="default: what the sweep was judged by")
    root.add_argument("--direction", choices=("minimize", "maximize"), help="default: the sweep's own")
    root.add_argument("--output", metavar="DIR", help="where to write, instead of DIR/report")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    return root


def command() -> None:
    given = parser().parse_args()
    from librobot.training.sweeps.report import report

    output = Path(given.output) if given.output else None
    report(Path(given.folder), given.objective, given.direction, output)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
