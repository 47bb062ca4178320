"""Copies of what a volume itself has, without its parents', to the same places of another bdev.

Of a chain of snapshots such copies, one on the other, make the same chain elsewhere. Context:
control (the asyncio thread).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import DrivebayError, NotFound, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.lvol.volume import Volume
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["ShallowCopies", "ShallowCopy"]

_log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 20


@dataclass
class ShallowCopy:
    """One: how far it is, and how it ended."""

    number: int
    total: int
    copied: int = 0
    error: int = 0  # errno
    ended: bool = False

    def show(self) -> dict[str, Any]:
        """As bdev_lvol_check_shallow_copy answers."""
        shown: dict[str, Any] = {"copied_clusters": self.copied, "total_clusters": self.total}
        if not self.ended:
            return shown | {"state": "in progress"}
        if self.error:
            return shown | {"state": "error", "error": os.strerror(self.error)}
        return shown | {"state": "complete"}


class ShallowCopies:
    """All copies of a target: those that run, and those whose end nobody has seen yet."""

    def __init__(self, registry: BdevRegistry, owner: Callable[[], Reactor]) -> None:
        self._registry = registry
        self._owner = owner
        self._copies: dict[int, ShallowCopy] = {}
        self._count = 0

    def start(self, volume: Volume, into: Bdev) -> ShallowCopy:
        """Begin one; ``into`` is its own until the end. Raises: DrivebayError."""
        source = volume.bdev
        if source is None:
            raise StateError(f"volume '{volume.alias}' lacks its external snapshot")
        if not source.readonly:
            raise StateError(
                f"volume '{volume.alias}' may be written while it is copied",
                hint="copy a snapshot of it, or set it read-only first",
            )
        _check_fits(source, into)
        holder = f"shallow copy of '{volume.alias}'"
        self._registry.claim(into, holder)
        self._count += 1
        copy = ShallowCopy(self._count, volume.allocated)
        self._copies[copy.number] = copy
        if copy.total == 0:
            copy.ended = True
            self._registry.release(into, holder)
        else:
            self._registry.spawn(self._run(copy, volume, source, into, holder))
        return copy

    def show(self, number: int) -> dict[str, Any]:
        """How far it is; one that has ended is forgotten then. Raises: NotFound."""
        copy = self._copies.get(number)
        if copy is None:
            raise NotFound(f"there is no copy {number}, or its end was shown already")
        if copy.ended:
            del self._copies[number]
        return copy.show()

    async def _run(
        self, copy: ShallowCopy, volume: Volume, source: Bdev, into: Bdev, holder: str
    ) -> None:
        try:
            await self._copy(copy, volume, source, into)
        except DrivebayError as error:
            copy.error = error.errno or errno.EIO
            _log.error("the %s to bdev '%s' failed: %s", holder, into.name, error)
        finally:
            copy.ended = True
            self._registry.release(into, holder)

    async def _copy(self, copy: ShallowCopy, volume: Volume, source: Bdev, into: Bdev) -> None:
        owner, cluster_bytes = self._owner(), volume.store.cluster_bytes
        size = source.num_blocks * source.block_size
        async with (
            self._registry.access(source, owner) as reading,
            self._registry.access(into, owner) as writing,
        ):
            for index in range(volume.table.num_clusters):
                if not volume.table.get(index):
                    continue
                start = index * cluster_bytes
                end = min(start + cluster_bytes, size)
                for offset in range(start, end, _PIECE_BYTES):
                    piece = await reading.read(offset, min(_PIECE_BYTES, end - offset))
                    await writing.write(offset, piece)
                copy.copied += 1
            await writing.flush()


def _check_fits(source: Bdev, into: Bdev) -> None:
    if into.readonly or "write" not in into.io_types:
        raise StateError(f"bdev '{into.name}' is read-only")
    if source.block_size % into.block_size:
        raise UsageError(
            f"bdev '{into.name}' has blocks of {into.block_size} bytes, which "
            f"{source.block_size} is no multiple of",
            field="dst_bdev_name",
        )
    if into.num_blocks * into.block_size < source.num_blocks * source.block_size:
        raise UsageError(
            f"bdev '{into.name}' is smaller than volume '{source.name}'", field="dst_bdev_name"
        )
