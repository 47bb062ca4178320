"""Which cores: SPDK's two ways to write a set of them. Pure.

A mask is hexadecimal, with or without ``0x`` (``0x3``, ``3``); a list stands in brackets
(``[0,2-3]``).
"""

from __future__ import annotations

import os
import re

from drivebay.errors import UsageError

__all__ = ["format_mask", "parse_cpumask", "present_cores"]

_MOST_CORES = 1024
_MASK = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,256})")
_SPAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def parse_cpumask(text: str) -> tuple[int, ...]:
    """Return the cores that ``text`` names, in rising order. Raises: UsageError.

    >>> parse_cpumask("0x5"), parse_cpumask("3"), parse_cpumask("[0,2-3]")
    ((0, 2), (0, 1), (0, 2, 3))
    """
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        cores = _parse_list(stripped[1:-1], text)
    else:
        match = _MASK.fullmatch(stripped)
        if match is None:
            raise _malformed(text)
        bits = int(match[1], 16)
        cores = {core for core in range(bits.bit_length()) if bits >> core & 1}
    if not cores:
        raise UsageError(f"cpumask '{text}' names no core", field="cpumask")
    return tuple(sorted(cores))


def _parse_list(inner: str, text: str) -> set[int]:
    cores: set[int] = set()
    for part in inner.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise _malformed(text)
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first or last >= _MOST_CORES:
            raise _malformed(text)
        cores.update(range(first, last + 1))
    return cores


def _malformed(text: str) -> UsageError:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return UsageError(
        f"cpumask '{shown}' is neither a hexadecimal mask nor a list in brackets",
        field="cpumask",
        hint="write 0x3 or [0,1] for the first two cores",
    )


def format_mask(cores: tuple[int, ...]) -> str:
    """Return the cores as a hexadecimal mask without prefix, as SPDK saves it.

    >>> format_mask((0, 2))
    '5'
    """
    return f"{sum(1 << core for core in cores):x}"


def present_cores(text: str) -> tuple[int, ...]:
    """Return the cores of ``text``, all of which this process may run on.

    Raises: UsageError that names the absent ones.
    """
    cores = parse_cpumask(text)
    allowed = os.sched_getaffinity(0)
    absent = [core for core in cores if core not in allowed]
    if absent:
        have = ",".join(str(core) for core in sorted(allowed))
        raise UsageError(
            f"cpumask '{text}' names cores that are not here: {', '.join(map(str, absent))} "
            f"(this process may use {have})",
            field="cpumask",
            hint=f"use a mask within 0x{format_mask(tuple(sorted(allowed)))}",
        )
    return cores
