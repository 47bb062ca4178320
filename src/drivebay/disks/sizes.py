"""Sizes as people write and read them: binary units, exact numbers of bytes.

Context: any.
"""

from __future__ import annotations

import re

from drivebay.errors import UsageError

__all__ = ["format_size", "read_size"]

_SIZE = re.compile(r"(\d+)(?:\.(\d+))?([kmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_SIZE_LIMIT = 2**63 - 1


def format_size(size: int) -> str:
    """Spell a number of bytes in binary units, with at most one digit after the point.

    >>> format_size(10 * 1024**3), format_size(1536), format_size(7)
    ('10 GiB', '1.5 KiB', '7 bytes')
    """
    if size < 1024:
        return f"{size} bytes"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        # What would be spelled 1024 belongs to the next unit.
        if round(value, 1) < 1024 or unit == "EiB":
            break
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def read_size(text: str) -> int:
    """Read a size: '4096', '4k', '10G', '1.5T'; units are binary, with or without 'iB'.

    >>> read_size("10G") == 10 * 1024**3
    True

    Raises: UsageError.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"'{text}' is not a size: write a number with k, M, G, T or P, such as 10G"
        )
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    scale = int("1" + "0" * len(fraction))
    size, rest = divmod(int(whole + fraction) << _UNITS[unit], scale)
    if rest:
        raise UsageError(f"'{text}' is not a whole number of bytes")
    if size > _SIZE_LIMIT:
        raise UsageError(f"'{text}' is more than {_SIZE_LIMIT} bytes")
    return size
