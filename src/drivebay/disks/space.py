"""How much room pools have, and how much of it was promised to disks.

Context: a short-lived process. Disks take up what is written to them, so a pool may promise
more than it holds; the warning comes before a disk's write fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.disks.inventory import Inventory, Pool
from drivebay.disks.places import free_bytes
from drivebay.disks.sizes import format_size

__all__ = ["Space", "space_of"]

_WARN_AT: Final = 0.8


@dataclass(frozen=True, slots=True)
class Space:
    """What a pool has promised to its disks, against what it can really hold."""

    disks: int
    promised: int
    real: int  # what the pool can hold, given what its file system has left

    def warning(self, pool: Pool) -> str | None:
        """A sentence when four fifths are used or promised."""
        used, real = format_size(pool.used), format_size(self.real)
        if pool.used >= _WARN_AT * self.real:
            return (
                f"pool '{pool.name}' is {_percent(pool.used, self.real)} full: {used} of {real}; "
                "its disks fail writes when nothing is left"
            )
        if self.promised >= _WARN_AT * self.real:
            return (
                f"{_percent(self.promised, self.real)} of pool '{pool.name}' is promised to its "
                f"disks: {format_size(self.promised)} of {real}; {used} is used"
            )
        return None


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "all"


def space_of(inventory: Inventory, pool: Pool) -> Space:
    """Add up what a pool has promised; a snapshot counts with what it holds."""
    disks = inventory.disks_of(pool)
    snapshots = [
        volume for volume in inventory.volumes if volume.snapshot and volume.pool == pool.name
    ]
    promised = sum(disk.size for disk in disks)
    promised += sum(snapshot.used or 0 for snapshot in snapshots)
    return Space(len(disks), promised, _real_space(pool))


def _real_space(pool: Pool) -> int:
    """A sparse file may grow as far as its file system has blocks; the rest has what it has."""
    place = None if pool.place is None else Path(pool.place)
    try:
        if place is None or not place.is_file():
            return pool.size
        return min(pool.size, place.stat().st_blocks * 512 + free_bytes(place))
    except OSError:
        return pool.size
