"""The base of a store as its metadata sees it: control's own I/O, and what clearing means there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from drivebay.bdev.access import Access
    from drivebay.bdev.base import Bdev

# What reads as zeroes where it was unmapped, and what only hands an unmap on. Others, as a bdev
# that encrypts, may show anything there.
_UNMAPS_TO_ZEROES: Final = frozenset({"malloc", "aio", "uring", "null"})
_HANDS_ON: Final = frozenset({"passthru", "delay", "error", "split", "gpt", "raid", "lvol"})


def unmaps_to_zeroes(bdev: Bdev) -> bool:
    """Whether what is unmapped reads as zeroes for sure."""
    if "unmap" not in bdev.io_types:
        return False
    if bdev.module in _UNMAPS_TO_ZEROES:
        return True
    return bdev.module in _HANDS_ON and all(
        base is not None and unmaps_to_zeroes(base) for base in bdev.bases
    )


class BaseDevice:
    """See metadata.Device; on an open channel of the base."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.bdev = access.channel.bdev
        self.unmaps_to_zeroes = unmaps_to_zeroes(self.bdev)

    @property
    def size(self) -> int:
        """Its size now, in bytes."""
        return self.bdev.num_blocks * self.bdev.block_size

    @property
    def block_size(self) -> int:
        """What offsets and lengths are multiples of."""
        return self.bdev.block_size

    async def read(self, offset: int, length: int) -> bytes:
        """Raises: HostError."""
        return await self._access.read(offset, length)

    async def write(self, offset: int, data: Any) -> None:
        """Raises: HostError."""
        await self._access.write(offset, data)

    async def flush(self) -> None:
        """Raises: HostError."""
        await self._access.flush()

    async def unmap(self, offset: int, length: int) -> None:
        """Nothing where the base can't. Raises: HostError."""
        if "unmap" in self.bdev.io_types:
            await self._access.unmap(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Raises: HostError."""
        await self._access.write_zeroes(offset, length, may_unmap=may_unmap)
