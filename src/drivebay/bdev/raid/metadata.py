"""Superblocks on their bdevs: reading what may be one, writing, clearing. Context: control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivebay.bdev.raid.superblock import Superblock, encode, length_of, parse

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["clear_superblock", "read_superblock", "write_superblock"]


def _whole_blocks(length: int, bdev: Bdev) -> int:
    return -(-length // bdev.block_size) * bdev.block_size


async def read_superblock(
    registry: BdevRegistry, bdev: Bdev, reactor: Reactor
) -> Superblock | None:
    """The superblock of a bdev, None when it has none.

    Raises: UsageError when it has one that can't be believed, HostError, StateError.
    """
    where = f"bdev '{bdev.name}'"
    async with registry.access(bdev, reactor) as access:
        start = await access.read(0, bdev.block_size)
        length = _whole_blocks(length_of(start, where), bdev)
        size = bdev.block_size * bdev.num_blocks
        if len(start) < length <= size:
            start += await access.read(len(start), length - len(start))
    return parse(start, where)


async def write_superblock(
    registry: BdevRegistry, bdev: Bdev, reactor: Reactor, sb: Superblock
) -> None:
    """Write it where it survives a power cut. Raises: HostError, StateError."""
    data = encode(sb)
    async with registry.access(bdev, reactor) as access:
        await access.write(0, data.ljust(_whole_blocks(len(data), bdev), b"\0"), fua=True)
        await access.flush()


async def clear_superblock(registry: BdevRegistry, bdev: Bdev, reactor: Reactor) -> None:
    """Make the bdev one without a superblock. Raises: HostError, StateError."""
    async with registry.access(bdev, reactor) as access:
        await access.write(0, bytes(bdev.block_size), fua=True)
        await access.flush()
