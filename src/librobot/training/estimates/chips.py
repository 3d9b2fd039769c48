"""What devices can do, by their makers' data sheets (dense matrix products, no sparsity).

Imports no torch, so that a command can list them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from librobot.errors import LibrobotError, nearest


@dataclass(frozen=True)
class Chip:
    """Memory in GB (1e9 bytes), bandwidth in GB/s, peaks in 1e12 operations a second. `float32` is that of
    matrix products without TF32, torch's default. None where nobody knows."""

    name: str
    memory: float
    bandwidth: float | None
    bfloat16: float | None
    float32: float | None

    def peak(self, precision: str) -> float | None:
        """Operations a second in a run of that `trainer.precision`."""
        value = self.float32 if precision.startswith(("32", "64")) else self.bfloat16
        return None if value is None else value * 1e12


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("b200", 180, 8000, 2250, 75),
        Chip("h200", 141, 4800, 989, 67),
        Chip("h100", 80, 3350, 989, 67),
        Chip("h100_pcie", 80, 2000, 756, 51),
        Chip("a100", 80, 2039, 312, 19.5),
        Chip("a100_40", 40, 1555, 312, 19.5),
        Chip("l40s", 48, 864, 362, 91.6),
        Chip("a6000", 48, 768, 155, 38.7),
        Chip("a10g", 24, 600, 70, 31.5),
        Chip("l4", 24, 300, 121, 30.3),
        Chip("rtx5090", 32, 1792, 209, 105),
        Chip("rtx4090", 24, 1008, 165, 82.6),
        Chip("rtx3090", 24, 936, 71, 35.6),
        Chip("t4", 16, 320, None, 8.1),
        Chip("v100", 32, 900, None, 15.7),
    )
}
# What torch calls a GPU -> its name here; the first that is contained counts.
TORCH_NAMES = {
    "B200": "b200", "H200": "h200", "H100 PCIe": "h100_pcie", "H100": "h100", "A100-SXM4-40": "a100_40",
    "A100-PCIE-40": "a100_40", "A100": "a100", "L40S": "l40s", "A6000": "a6000", "A10G": "a10g", "L4": "l4",
    "RTX 5090": "rtx5090", "RTX 4090": "rtx4090", "RTX 3090": "rtx3090", "T4": "t4", "V100": "v100",
}  # fmt: skip


def parse_devices(text: str) -> list[tuple[Chip, int]]:
    """`h100:8,a100` as chips and numbers. Raises LibrobotError for unknown names and numbers below 1."""
    found = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name.lower() not in CHIPS:
            raise LibrobotError(f"--devices {part}: unknown device; {nearest(name.lower(), CHIPS)}")
        if number and not (number.isdigit() and int(number) > 0):
            raise LibrobotError(f"--devices {part}: expected NAME:NUMBER, a number of at least 1")
        found.append((CHIPS[name.lower()], int(number or 1)))
    return found


def chip_of(torch_name: str) -> Chip | None:
    """The chip that torch calls so."""
    name = next((own for theirs, own in TORCH_NAMES.items() if theirs in torch_name), None)
    return None if name is None else CHIPS[name]


def host_memory() -> float:
    """GB of this machine's memory that processes can still have."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
