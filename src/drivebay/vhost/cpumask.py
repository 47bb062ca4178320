"""Masks of processor cores, as SPDK writes them: "0x3", "3" or "[0,2-5]".

Context: any; no I/O.
"""

from __future__ import annotations

import re
from typing import Final

from drivebay.errors import UsageError

__all__ = ["MAX_CORES", "parse_cpumask"]

MAX_CORES: Final = 1024

_HEX: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]+")
_LIST: Final = re.compile(r"\[\s*\d+(?:-\d+)?(?:\s*,\s*\d+(?:-\d+)?)*\s*\]")


def parse_cpumask(text: str, field: str = "cpumask") -> int:
    """The mask as a number, core 0 in bit 0. Raises: UsageError.

    >>> parse_cpumask("[0,2-3]") == parse_cpumask("0xd") == parse_cpumask("d") == 13
    True
    """
    if len(text) <= MAX_CORES and _HEX.fullmatch(text):
        mask = int(text, 16)
    elif len(text) <= 8 * MAX_CORES and _LIST.fullmatch(text):
        mask = 0
        for part in text.strip("[] ").split(","):
            first, _dash, last = part.strip().partition("-")
            low, high = int(first[:6]), int((last or first)[:6])
            if low > high or high >= MAX_CORES:
                raise UsageError(
                    f"cpumask '{text[:80]}' names cores {low} to {high} (0 to {MAX_CORES - 1} "
                    "are possible, the lower one first)",
                    field=field,
                )
            mask |= (1 << high + 1) - (1 << low)
    else:
        raise UsageError(
            f"cpumask '{text[:80]}' is neither a hexadecimal mask nor a list of cores",
            field=field,
            hint="write 0x3 or [0,1] for the cores 0 and 1",
        )
    if mask == 0 or mask >> MAX_CORES:
        raise UsageError(f"cpumask '{text[:80]}' names no possible core", field=field)
    return mask
