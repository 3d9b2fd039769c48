"""Arguments that the commands of librobot-data share: the dataset and the options of its format."""

from __future__ import annotations

import argparse

FORMATS = "lerobot, hdf5, libero, aloha, zarr, webdataset, mcap, rlds, oxe_*; default: by its files"


def add_source(command: argparse.ArgumentParser) -> None:
    """The one dataset that a command reads; its KEY=VALUE options come last."""
    command.add_argument("root", metavar="SRC", help="the dataset's folder or file")
    command.add_argument("--from", dest="format", metavar="FORMAT", help=FORMATS)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of the source: layout=libero")
