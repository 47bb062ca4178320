"""How many blocks a RAID has on members of given sizes. Context: any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from drivebay.errors import UsageError

__all__ = ["LEAST_MEMBERS", "check_shape", "data_sizes", "num_blocks", "strip_in_blocks"]

LEAST_MEMBERS: Final = {"raid0": 1, "concat": 1, "raid1": 2}
_MOST_STRIP_KB: Final = 1 << 31


def check_shape(level: str, strip_size_kb: int, members: int) -> None:
    """Raises: UsageError when there can be no such RAID."""
    if level not in LEAST_MEMBERS:
        raise UsageError(
            f"{level} is not part of this version",
            field="raid_level",
            hint="use raid1, or raid0 or concat without redundancy",
        )
    if level == "raid1":
        if strip_size_kb:
            raise UsageError("raid1 has no strips", field="strip_size_kb", hint="leave it out")
    elif not 0 < strip_size_kb <= _MOST_STRIP_KB or strip_size_kb & (strip_size_kb - 1):
        raise UsageError(
            f"a strip of {level} can't be {strip_size_kb} KiB",
            field="strip_size_kb",
            hint="give a power of two, such as 64",
        )
    if members < LEAST_MEMBERS[level]:
        raise UsageError(
            f"{level} needs {LEAST_MEMBERS[level]} base bdevs, {members} are given",
            field="base_bdevs",
        )


def strip_in_blocks(level: str, strip_size_kb: int, block_size: int) -> int:
    """Raises: UsageError when a strip is smaller than a block."""
    strip = strip_size_kb * 1024 // block_size
    if strip == 0 and level != "raid1":
        raise UsageError(
            f"a strip of {strip_size_kb} KiB is smaller than a block of {block_size} bytes",
            field="strip_size_kb",
        )
    return strip


def data_sizes(level: str, strip: int, sizes: Sequence[int]) -> list[int]:
    """What is used of members with that many blocks.

    >>> data_sizes("raid0", 8, [20, 33]), data_sizes("concat", 8, [20, 33])
    ([16, 16], [16, 32])
    """
    if level == "concat":
        return [size // strip * strip for size in sizes]
    least = min(sizes)
    return [least if level == "raid1" else least // strip * strip] * len(sizes)


def num_blocks(level: str, used: Sequence[int]) -> int:
    """The size of the RAID; ``used`` is of data_sizes()."""
    return used[0] if level == "raid1" else sum(used)
