"""librobot-export: a trained policy in another form."""

from __future__ import annotations

import argparse
import importlib

from librobot.checkpoint_path import checkpoint_file
from librobot.cli.app import start

# Subcommand -> the module and function(checkpoint, output) that do it, what is written, help.
EXPORTS = {
    "merge": (
        "librobot.export.adapters",
        "merge",
        "OUT",
        "a checkpoint with the adapter folded into the weights",
    ),
    "lerobot": (
        "librobot.interchange.lerobot",
        "export_checkpoint",
        "OUTDIR",
        "a folder that lerobot's policies load",
    ),
    "consolidate": (
        "librobot.training.checkpoints",
        "consolidate",
        "OUT",
        "a sharded checkpoint (a folder) as one self-contained file",
    ),
    "adapters": ("librobot.export.adapters", "adapters", "OUTDIR", "the adapter alone, in peft's files"),
}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("librobot-export", description="Write a trained policy in another form.")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = root.add_subparsers(dest="command", required=True)
    for name, (_, _, output, text) in EXPORTS.items():
        command = commands.add_parser(name, help=text, description=f"Write {text}.")
        command.add_argument("checkpoint", metavar="CKPT", help="a checkpoint or a run directory with one")
        command.add_argument("output", metavar=output, help="where to write; must not exist yet")
    return root


def command() -> None:
    arguments = parser().parse_args()
    checkpoint_file(arguments.checkpoint)
    module, function, _, _ = EXPORTS[arguments.command]
    written = getattr(importlib.import_module(module), function)(arguments.checkpoint, arguments.output)
    print(f"wrote {written}")


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
