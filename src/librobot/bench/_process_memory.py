"""What a process has for itself. Imports nothing that would count."""

from __future__ import annotations

from pathlib import Path


def own_mebibytes(pid: int | str = "self") -> float:
    """The memory that a process itself has filled, in MiB (RssAnon), with all that it was forked with.

    Not counted are mapped files, whose pages the system takes back when it likes, and the memory in which
    batches go to the training process, which is there while they are. Proportional shares (smaps) would move
    when the process that it was forked from writes to its pages.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/{pid}/status has no RssAnon, which Linux has since 4.5")
