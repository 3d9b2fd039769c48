"""librobot-data: look into datasets, check and convert them."""

from __future__ import annotations

import argparse

from librobot.cli.app import start


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("librobot-data", description="Look into datasets, check and convert them.")
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = root.add_subparsers(dest="command", required=True)
    for name, text in (("info", "robot, cameras, episodes, tasks"), ("stats", "ranges of its vectors")):
        command = commands.add_parser(name, help=f"{text} of a LeRobotDataset")
        command.add_argument("root", metavar="DIR", help="the folder that holds meta/info.json")
    check = commands.add_parser("check", help="find what is wrong with a dataset; exit code 3 for findings")
    check.add_argument("--pictures", type=int, default=3, help="how many of each episode are looked at")
    convert = commands.add_parser("convert", help="write a dataset in another format")
    convert.add_argument("--to", required=True, choices=("lerobot", "hdf5", "zarr"))
    convert.add_argument(
        "--video", action="store_true", help="lerobot: encode pictures; else all pixels stay"
    )
    convert.add_argument("--fps", type=int, help="lerobot: where the source's rate is no whole number")
    convert.add_argument("--prompt", help="the instruction of every episode, instead of the source's")
    formats = "lerobot, hdf5, libero, aloha, zarr, rlds or oxe_*; default: what its files look like"
    for command in (check, convert):
        command.add_argument("root", metavar="SRC", help="the dataset's folder or file")
        command.add_argument("--from", dest="format", metavar="FORMAT", help=formats)
    convert.add_argument("target", metavar="DST", help="the new folder")
    for command in (check, convert):
        command.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of the source: layout=libero")
    return root


def command() -> object:
    given = parser().parse_args()
    if given.command in ("info", "stats"):
        from librobot.data import inspect

        return (inspect.print_info if given.command == "info" else inspect.print_stats)(given.root)
    from librobot.config.build import open_source
    from librobot.data.check import check
    from librobot.data.convert import convert

    source = open_source(given.root, given.format, given.options)
    if given.command == "convert":
        return convert(source, given.target, given.to, video=given.video, fps=given.fps, prompt=given.prompt)
    findings = check(source, pictures=given.pictures)
    print("\n".join(map(str, findings)) or "nothing found")
    raise SystemExit(3 if findings else 0)


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
