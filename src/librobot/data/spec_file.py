"""The robot of a dataset whose format has no place for it: a file beside the data that our writers leave."""

from __future__ import annotations

import json
from pathlib import Path

from librobot.errors import LibrobotError
from librobot.types import RobotSpec

SPEC = "librobot.json"


def read_spec(folder: Path) -> RobotSpec | None:
    """The robot that our writer left in `folder`; None: it was not ours. Raises LibrobotError, by file."""
    path = folder / SPEC
    if not path.exists():
        return None
    try:
        return RobotSpec.from_dict(json.loads(path.read_text(encoding="utf-8"))["spec"])
    except (TypeError, ValueError, KeyError) as error:
        raise LibrobotError(f"{path}: spec: expected what RobotSpec.to_dict gives: {error}") from error
