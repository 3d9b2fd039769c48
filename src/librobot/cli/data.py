"""librobot-data: look into datasets, check and convert them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from librobot.cli.app import start

ANY = "lerobot, hdf5 (robomimic), libero, aloha, zarr, rlds, oxe_*; by default what its files look like"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("librobot-data", description="Look into datasets, check and convert them.")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = root.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "robot, cameras, episodes, tasks"),
        ("stats", "ranges of states and actions"),
    ):
        command = commands.add_parser(name, help=f"{text} of a LeRobotDataset")
        command.add_argument("root", metavar="DIR", help="the folder that holds meta/info.json")
    check = commands.add_parser(
        "check", help="find what is wrong with a dataset; exit code 3 where something is"
    )
    convert = commands.add_parser("convert", help="write a dataset in another format")
    for command in (check, convert):
        command.add_argument("root", metavar="SRC", help="the dataset's folder or file")
    convert.add_argument("target", metavar="DST", help="the new folder")
    convert.add_argument("--to", required=True, choices=("lerobot", "hdf5", "zarr"))
    convert.add_argument(
        "--video", action="store_true", help="lerobot: encode pictures; else every pixel is kept"
    )
    convert.add_argument("--fps", type=int, help="lerobot: the rate, where the source's is no whole number")
    convert.add_argument("--prompt", help="the instruction of every episode, instead of the source's")
    check.add_argument("--pictures", type=int, default=3, help="how many of each episode are looked at")
    for command in (check, convert):
        command.add_argument("--from", dest="format", metavar="FORMAT", help=ANY)
        command.add_argument(
            "options", nargs="*", metavar="KEY=VALUE", help="of the source, e.g. layout=libero"
        )
    return root


def opened(arguments: argparse.Namespace) -> Any:
    """The source that the configuration group data makes of the arguments."""
    from librobot.config.build import build_datamodule
    from librobot.config.compose import compose
    from librobot.data.detect import detect

    options = [f"data.source.{option}" for option in arguments.options]
    chosen = [f"data={arguments.format or detect(arguments.root)}", f"data.root={arguments.root}"]
    return build_datamodule(compose([*chosen, *options])).source


def command() -> None:
    arguments = parser().parse_args()
    if arguments.command == "convert":
        from librobot.data.convert import convert

        convert(
            opened(arguments),
            arguments.target,
            arguments.to,
            image_format="video" if arguments.video else "image",
            fps=arguments.fps,
            prompt=arguments.prompt,
        )
    elif arguments.command == "check":
        from librobot.data.check import check

        findings = check(opened(arguments), pictures=arguments.pictures)
        print("\n".join(map(str, findings)) or "nothing found")
        sys.exit(3 if findings else 0)
    else:
        from librobot.data import inspect

        {"info": inspect.print_info, "stats": inspect.print_stats}[arguments.command](arguments.root)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
