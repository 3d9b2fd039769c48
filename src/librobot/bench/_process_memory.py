"""What a process has for itself. Imports nothing that would count."""

from __future__ import annotations

from pathlib import Path


def own_mebibytes(pid: int | str = "self") -> float:
    """The memory that a process itself has filled, in MiB, with its share of what it has in common with the
    process that it was forked from. Mapped files do not count (the system takes their pages back when it
    likes), nor does the memory in which batches go to the training process (it is there while they are)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss_Anon; Linux has it since 5.3")
