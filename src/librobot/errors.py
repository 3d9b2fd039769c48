"""Errors that a user can act on, and the helpers that word them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LibrobotError(Exception):
    """Bad input or a missing piece. The message names the place, what was expected, what was found and
    what to do; the command line prints it without a traceback (unless `--debug`)."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest valid name and all the others."""
    known = sorted({str(option) for option in options})
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid names: {', '.join(known) or '(none)'}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LibrobotError(
            f"{module} is needed here and could not be imported ({error}); "
            f"install it with: pip install 'librobot[{extra}]'"
        ) from error
