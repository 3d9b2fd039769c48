"""librobot: list the commands."""

from __future__ import annotations

import argparse

from librobot import __version__

COMMANDS = {
    "librobot-train": "train a policy from demonstrations",
    "librobot-eval": "measure a checkpoint's success in simulation",
    "librobot-record": "record a scripted expert's demonstrations",
    "librobot-data": "look into datasets, check, convert, merge, split and filter them",
    "librobot-export": "write a trained policy in another form: merge, adapters",
    "librobot-import": "turn a published checkpoint (lerobot, openpi, OpenVLA, GR00T) into ours",
    "librobot-sweep-report": "table and plots of a sweep, from its folder",
    "librobot-bench": "measure one thing side by side with a peer: step",
}


def main() -> None:
    lines = "\n".join(f"  {name:<21} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "librobot",
        description=f"librobot {__version__}: vision-language-action policies, composed by configuration.",
        epilog=f"commands (each with --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"librobot {__version__}")
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
