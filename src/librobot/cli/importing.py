"""librobot-import: a published checkpoint as a librobot one."""

from __future__ import annotations

import argparse

from librobot.cli.app import start


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "librobot-import",
        description="Turn a published checkpoint (lerobot, openpi's PyTorch export, OpenVLA, GR00T) into a "
        "librobot checkpoint. Every tensor must have its place.",
    )
    root.add_argument("--debug", action="store_true", help="errors with a traceback")
    root.add_argument("folder", metavar="FOLDER", help="the published checkpoint's folder")
    root.add_argument("output", metavar="OUT.ckpt", help="the file to write; must not exist yet")
    root.add_argument("--tokenizer", help="the backbone's, where FOLDER holds none: a folder or a name")
    root.add_argument("--hz", dest="control_hz", type=float, default=30.0, help="control rate (default: 30)")
    root.add_argument("--robot", help="a name for the robot")
    root.add_argument("--embodiment", help="which of the checkpoint's robots, where it knows several")
    root.add_argument("--horizon", type=int, help="actions in a chunk, where no file says it (OpenVLA-OFT)")
    root.add_argument(
        "--cameras",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        metavar="NAME,NAME",
        help="the pictures in the model's order, where no file of FOLDER says it (OpenVLA-OFT)",
    )
    return root


def command() -> None:
    arguments = parser().parse_args()
    from librobot.interchange.base import ImportOptions, import_checkpoint

    given = {
        name: value for name, value in vars(arguments).items() if name not in ("debug", "folder", "output")
    }
    written, framework = import_checkpoint(arguments.folder, arguments.output, ImportOptions(**given))
    spec = framework.spec
    print(
        f"wrote {written}: {type(framework).__name__} for robot {spec.name!r} "
        f"(cameras {', '.join(spec.camera_names)}; {spec.state_dim} state and {spec.action_dim} action "
        f"dimensions; chunks of {framework.horizon})"
    )


def main() -> None:
    start(command)


if __name__ == "__main__":
    main()
