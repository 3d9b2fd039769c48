"""The files of a published checkpoint, read with one sentence for each thing wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from librobot.errors import LibrobotError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LibrobotError where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LibrobotError(
            f"{path}: expected a file of the checkpoint, found none; is the download complete?"
        ) from None
    except (OSError, ValueError) as error:
        raise LibrobotError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(found, dict):
        raise LibrobotError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def member(content: Mapping[str, Any], keys: Sequence[str], place: Path) -> Any:
    """What stands under `keys`, one inside the other. Raises LibrobotError where one is missing."""
    found: Any = content
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            raise LibrobotError(
                f"{place}: expected {'.'.join(keys)}, and {key!r} is not there; found "
                f"{', '.join(found) if isinstance(found, Mapping) else type(found).__name__}"
            )
        found = found[key]
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises LibrobotError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise LibrobotError(
            f"{path}: expected a file of the checkpoint, found none; is the download complete?"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LibrobotError(
            f"{path}: not a readable safetensors file ({error}); load it down again"
        ) from error
