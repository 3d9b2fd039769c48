"""A folder that appears when it is whole, made by work that can be interrupted and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from librobot.data.files import locked, write_json
from librobot.errors import LibrobotError


@contextmanager
def new_folder(target: str | Path, described: Mapping[str, Any]) -> Iterator[Path]:
    """Yields TARGET.partial, with the parts that an interrupted run left in it; it is renamed to `target` at
    the end of the block. described: what is being made, in plain values, so that only the same work goes on.

    Raises LibrobotError where `target` exists or the parts are of other work.
    """
    target = Path(target).expanduser().absolute()
    if target.exists():
        raise LibrobotError(f"{target}: exists already; name a new folder, or remove it")
    partial = target.with_name(f"{target.name}.partial")
    record = target.with_name(f"{target.name}.partial.json")
    lock = target.with_name(f"{target.name}.lock")
    plain = json.loads(json.dumps(described))
    with locked(lock):
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) != plain:
            raise LibrobotError(f"{partial}: parts of another conversion; remove them and {record.name}")
        if partial.exists() and not record.exists():
            raise LibrobotError(f"{partial}: in the way, and not of a conversion; move it")
        write_json(record, plain)
        try:
            yield partial
        except BaseException:
            if not partial.exists():  # nothing is kept, so nothing else is kept from starting
                record.unlink()
                lock.unlink(missing_ok=True)
            raise
        partial.rename(target)
        record.unlink()
    lock.unlink(missing_ok=True)
