"""What a guest talks to when its bdev was removed: a disk on which every I/O fails.

Context: control. One for the whole process, with one channel per reactor; it
lives here and not in the bdev registry, because nobody should find it by name.
"""

from __future__ import annotations

import asyncio
from typing import Final

from drivebay.bdev.base import Channel
from drivebay.bdev.malloc import MallocBdev
from drivebay.reactor.reactor import Reactor

__all__ = ["RemovedDisk"]

_BLOCK_BYTES: Final = 512


class RemovedDisk:
    """Channels that refuse everything."""

    def __init__(self) -> None:
        # A malloc bdev can do everything, so that no request is "unsupported" where it should fail.
        self._bdev = MallocBdev("removed", None, _BLOCK_BYTES, 1)
        self._channels: dict[Reactor, asyncio.Task[Channel]] = {}

    def owns(self, channel: Channel) -> bool:
        return channel.bdev is self._bdev

    async def channel(self, reactor: Reactor) -> Channel:
        """This reactor's channel, opened once and kept. Raises: HostError."""
        opening = self._channels.get(reactor)
        if opening is None or _failed(opening):
            opening = self._channels[reactor] = asyncio.ensure_future(self._open(reactor))
        return await asyncio.shield(opening)

    async def _open(self, reactor: Reactor) -> Channel:
        channel = await asyncio.to_thread(self._bdev.open_channel, reactor)
        await channel.activate()
        await channel.remove()
        return channel

    async def close(self) -> None:
        """After the last session."""
        while self._channels:
            _reactor, opening = self._channels.popitem()
            await asyncio.wait([opening])
            if not _failed(opening):
                await opening.result().close()
        await asyncio.to_thread(self._bdev.close)


def _failed(opening: asyncio.Task[Channel]) -> bool:
    """An opening that failed is nobody's: the next user tries again."""
    return opening.done() and (opening.cancelled() or opening.exception() is not None)
