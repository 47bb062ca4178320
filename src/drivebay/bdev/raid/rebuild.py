"""Copying the data of a mirror to a member that lacks them, while guests write.

It goes window by window: writes to the window are held on every channel and those in flight
are waited for, then the window is copied, then the held ones go on, to the new member too.
Context: control.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from drivebay.bdev.raid.member import Slot
from drivebay.errors import DrivebayError, HostError, StateError

if TYPE_CHECKING:
    from drivebay.bdev.access import Access
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.raid.mirror_array import MirrorArray

__all__ = ["Copier", "Rebuild", "TargetLost"]

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 18
_PIECES_AT_ONCE = 8


class TargetLost(HostError):
    """The member that is written to failed, not one that is read from."""


class Copier:
    """Reads and writes of members, through channels that it opens when it needs them."""

    def __init__(self, array: MirrorArray) -> None:
        self._array = array
        self._open: dict[Slot, tuple[Bdev, Access]] = {}
        self._opening = asyncio.Lock()

    async def access(self, slot: Slot) -> Access:
        """Control's way to a member. Raises: StateError when the slot is empty, HostError."""
        async with self._opening:
            return await self._access(slot)

    async def _access(self, slot: Slot) -> Access:
        from drivebay.bdev.access import Access  # compiled; loaded when needed

        bdev, access = self._open.get(slot, (None, None))
        if access is not None and bdev is slot.bdev:
            return access
        await self._shut(slot)
        if slot.bdev is None:
            raise StateError(f"slot {slot.number} has no bdev any more")
        bdev = slot.bdev
        channel = await self._array.registry.open_channel(bdev, self._array.around.reactor())
        access = Access(channel)
        self._open[slot] = (bdev, access)
        return access

    async def _shut(self, slot: Slot) -> None:
        _, access = self._open.pop(slot, (None, None))
        if access is not None:
            with contextlib.suppress(DrivebayError):
                await self._array.registry.close_channel(access.channel)

    async def close(self) -> None:
        """Let go of all channels."""
        for slot in list(self._open):
            await self._shut(slot)

    def _start_of(self, slot: Slot) -> int:
        return slot.data_offset * (self._array.block_size or 0)

    async def _read(self, slot: Slot, offset: int, length: int) -> bytes:
        access = await self.access(slot)
        return await access.read(self._start_of(slot) + offset, length)

    async def read_again(self, target: Slot, offset: int, length: int) -> None:
        """Whether what was copied can be read. Raises: TargetLost."""
        for at in range(offset, offset + length, _PIECE_BYTES):
            try:
                await self._read(target, at, min(_PIECE_BYTES, offset + length - at))
            except DrivebayError as error:
                raise TargetLost(f"'{target.name}' can't be read", error.errno) from error

    async def copy(self, target: Slot, start: int, end: int) -> None:
        """Give the target these bytes of the disk. They must not be written meanwhile.

        Raises: TargetLost, HostError when no source has them.
        """
        batch = _PIECE_BYTES * _PIECES_AT_ONCE
        for first in range(start, end, batch):
            last = min(first + batch, end)
            pieces = [
                self._copy_piece(target, offset, min(_PIECE_BYTES, last - offset))
                for offset in range(first, last, _PIECE_BYTES)
            ]
            # All have ended when one has failed: the window may be let go then.
            for outcome in await asyncio.gather(*pieces, return_exceptions=True):
                if outcome is not None:
                    raise outcome

    async def _copy_piece(self, target: Slot, offset: int, length: int) -> None:
        data = await self._read_any(target, offset, length)
        try:
            access = await self.access(target)
            await access.write(self._start_of(target) + offset, data)
        except DrivebayError as error:
            raise TargetLost(f"'{target.name}' can't be written", error.errno) from error

    async def _read_any(self, target: Slot, offset: int, length: int) -> bytes:
        failure: DrivebayError | None = None
        for slot in self._array.sources:
            if slot is target:
                continue
            try:
                return await self._read(slot, offset, length)
            except DrivebayError as error:
                failure = error
        raise failure or StateError("there is no other member to copy from")


class Rebuild:
    """One member on its way to having all data. ``run`` is its task."""

    def __init__(
        self, array: MirrorArray, target: Slot, window_kb: int, most_mb_per_s: int
    ) -> None:
        self.target = target
        self._array = array
        self._window_bytes = window_kb * 1024
        self._bytes_per_s = most_mb_per_s << 20
        self._done = 0
        self._stopped = asyncio.Event()
        self._why = ""
        self.task: asyncio.Task[Any] | None = None

    def describe(self) -> dict[str, Any]:
        """As bdev_raid_get_bdevs shows it."""
        block_size = self._array.block_size or 1
        size = self._size() or 1
        progress = {"blocks": self._done // block_size, "percent": self._done * 100 // size}
        return {"type": "rebuild", "target": self.target.name, "progress": progress}

    def stop(self, why: str) -> None:
        """Have it end soon, without success."""
        self._why = self._why or why
        self._stopped.set()

    async def cancel(self, why: str) -> None:
        """stop(), and wait until it has ended and its target is let go."""
        self.stop(why)
        if self.task is not None:
            await asyncio.wait([self.task])

    def _size(self) -> int:
        disk = self._array.disk
        return 0 if disk is None else disk.num_blocks * disk.block_size

    async def run(self) -> None:
        """Copy all, then tell the array how it went."""
        array = self._array
        _log.info("RAID '%s': rebuild of '%s' begins", array.name, self.target.name)
        failure: str | None = None
        copier = Copier(array)
        try:
            await self._copy_all(copier)
            await (await copier.access(self.target)).flush()
            if self._stopped.is_set():
                failure = self._why
        except DrivebayError as error:
            failure = str(error)
        finally:
            await copier.close()
        await array.rebuild_ended(self, failure)

    async def _copy_all(self, copier: Copier) -> None:
        block_size = self._array.block_size or 1
        window = -(-self._window_bytes // block_size) * block_size
        started = time.monotonic()
        while self._done < (size := self._size()) and not self._stopped.is_set():
            end = min(self._done + window, size)
            async with self._array.window(self._done, end, frontier=end):
                await copier.copy(self.target, self._done, end)
            self._done = end
            if self._bytes_per_s:
                await self._rest(started + self._done / self._bytes_per_s - time.monotonic())

    async def _rest(self, seconds: float) -> None:
        """Wait, or until stop()."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._stopped.wait()
