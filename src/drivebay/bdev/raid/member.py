"""One place in a RAID, and the bdev in it if there is one; what a disk knows of its RAID.

Context: control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from drivebay.bdev.raid.superblock import LEAST_DATA_OFFSET
from drivebay.errors import UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev

__all__ = ["NO_UUID", "Raid", "Slot", "check_member"]

NO_UUID: Final = UUID(int=0)


class Raid(Protocol):
    """What a disk asks, and tells, the RAID that it is."""

    def describe(self) -> dict[str, Any]:
        """Itself, as bdev_get_bdevs shows it."""

    def size_on_bases(self) -> int:
        """Blocks it has now that a base has another size."""

    def trouble(self) -> None:
        """A channel has failed legs, or something to repair."""


@dataclass(eq=False)
class Slot:
    """A place for a base; ``bdev`` is there, claimed and checked, or not."""

    number: int
    name: str | None = None
    uuid: UUID = NO_UUID
    bdev: Bdev | None = None
    data_offset: int = 0  # blocks
    data_size: int = 0

    def describe(self) -> dict[str, Any]:
        """As base_bdevs_list shows it."""
        return {
            "name": self.name,
            "uuid": str(self.uuid),
            "is_configured": self.bdev is not None,
            "data_offset": self.data_offset,
            "data_size": self.data_size,
        }

    def awaits(self, bdev: Bdev) -> bool:
        """Whether it is empty and this is the bdev that it is kept for."""
        if self.bdev is not None:
            return False
        if self.uuid != NO_UUID:
            return self.uuid == bdev.uuid
        named = self.name is not None and self.name.lower() == str(bdev.uuid)
        return named or self.name == bdev.name or self.name in bdev.aliases


def check_member(
    slot: Slot, bdev: Bdev, raid: str, block_size: int | None, superblock: bool
) -> tuple[int, int]:
    """Where the data would begin on ``bdev``, and how many blocks. Raises: UsageError."""
    if block_size is not None and bdev.block_size != block_size:
        raise UsageError(
            f"bdev '{bdev.name}' has blocks of {bdev.block_size} bytes, "
            f"the others of RAID '{raid}' have {block_size}",
            field="base_bdevs",
            hint="use bdevs with the same block size",
        )
    if bdev.readonly or not {"read", "write"} <= bdev.io_types:
        raise UsageError(f"bdev '{bdev.name}' is read-only, a member of a RAID is written")
    offset = slot.data_offset
    if superblock and offset == 0:
        offset = LEAST_DATA_OFFSET // bdev.block_size
    size = slot.data_size or bdev.num_blocks - offset
    if size <= 0 or offset + size > bdev.num_blocks:
        raise UsageError(
            f"bdev '{bdev.name}' has {bdev.num_blocks} blocks: too small for RAID '{raid}', "
            f"whose data are {max(size, 1)} blocks from block {offset} on",
            field="base_bdevs",
        )
    return offset, size
