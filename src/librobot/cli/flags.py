"""Flags of a command that Hydra must not see."""

from __future__ import annotations

import sys

from librobot.cli.app import report
from librobot.errors import LibrobotError


def flag(*flags: str, options: tuple[str, ...] = ()) -> dict[str, str]:
    """Take one of `flags` and the `options` that go with it off the command line, before Hydra reads it:
    {"what": the flag's name, option: its text}, {} where no flag is given. Exits with 2 for two flags, for
    an option without a flag and for one without a value."""
    given = [word for word in sys.argv[1:] if word in flags]
    found = {"what": given[0].strip("-").replace("-", "_")} if given else {}
    rest: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if name in options:
            value = value if equals else next(words, "")
            if not given or not value:
                asks = f"{name}: expected {name} VALUE beside one of {', '.join(flags)}"
                sys.exit(report(LibrobotError(asks)))
            found[name.strip("-")] = value
        elif word not in flags:
            rest.append(word)
    if len(given) > 1:
        sys.exit(report(LibrobotError(f"{' '.join(given)}: expected one of them at a time")))
    sys.argv[1:] = rest
    return found
