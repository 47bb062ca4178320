"""The channels of one bdev: one a reactor, opened for its first user, on those of its bases.

Context: control (the asyncio thread); only open_channel of a bdev runs in worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivebay.errors import StateError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev, Channel
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["BdevChannels"]


@dataclass(eq=False)
class _Slot:
    """One reactor's channel, those of the bases below it, and how many hold it."""

    bases: list[Channel | None] = field(default_factory=list)
    opening: asyncio.Task[Channel] | None = None
    users: int = 0
    closing: asyncio.Task[None] | None = None

    @property
    def channel(self) -> Channel | None:
        """The channel, while it is open."""
        done = self.opening is not None and self.opening.done() and not self.opening.cancelled()
        if not done or not self.users or self.opening is None or self.opening.exception():
            return None
        return self.opening.result()


class BdevChannels:
    """All channels into ``bdev``; the registry finds those of its bases."""

    __slots__ = ("_bdev", "_quiet", "_registry", "_slots", "removed")

    def __init__(self, bdev: Bdev, registry: BdevRegistry) -> None:
        self._bdev = bdev
        self._registry = registry
        self._slots: dict[Reactor, _Slot] = {}
        self._quiet = asyncio.Lock()  # held while one opens, and while all are gated
        self.removed = False

    @property
    def in_use(self) -> bool:
        """Whether there is any, one that is closing included."""
        return bool(self._slots)

    def open_ones(self) -> list[Channel]:
        """The channels that are open now."""
        return [channel for slot in self._slots.values() if (channel := slot.channel)]

    def has(self, channel: Channel) -> bool:
        """Whether it is one of these, and open."""
        slot = self._slots.get(channel.reactor)
        return slot is not None and slot.channel is channel

    async def open(self, reactor: Reactor) -> Channel:
        """Raises: StateError when the bdev is being removed, HostError when it can't open."""
        while (slot := self._slots.get(reactor)) is not None and slot.closing is not None:
            await asyncio.shield(slot.closing)
            self._require_present()
        if slot is None:
            slot = self._slots[reactor] = _Slot()
            slot.opening = self._registry.spawn(self._open(reactor, slot))
        assert slot.opening is not None
        slot.users += 1
        delivered = False
        try:
            channel = await asyncio.shield(slot.opening)
            self._require_present()
            delivered = True
        finally:
            if not delivered:
                self._let_go(reactor, slot)
        return channel

    def _require_present(self) -> None:
        if self.removed:
            raise StateError(f"bdev '{self._bdev.name}' is being removed")

    async def _open(self, reactor: Reactor, slot: _Slot) -> Channel:
        async with self._quiet:
            try:
                for base in self._bdev.bases:
                    slot.bases.append(await self._open_base(base, reactor))
                channel = await asyncio.to_thread(self._bdev.open_channel, reactor, *slot.bases)
            except BaseException:
                await self._close_bases(slot)
                raise
            await channel.activate()
        return channel

    async def _open_base(self, base: Bdev | None, reactor: Reactor) -> Channel | None:
        return None if base is None else await self._registry.open_channel(base, reactor)

    async def _close_bases(self, slot: _Slot) -> None:
        bases, slot.bases = slot.bases, []
        for channel in bases:
            if channel is not None:
                await self._registry.close_channel(channel)

    async def close(self, channel: Channel) -> None:
        """Let go of an open one; the last user's call returns when the reactor has too."""
        closing = self._let_go(channel.reactor, self._slots[channel.reactor])
        if closing is not None:
            await asyncio.shield(closing)

    def _let_go(self, reactor: Reactor, slot: _Slot) -> asyncio.Task[None] | None:
        slot.users -= 1
        if slot.users == 0:
            slot.closing = self._registry.spawn(self._shut(reactor, slot))
        return slot.closing

    async def _shut(self, reactor: Reactor, slot: _Slot) -> None:
        """Close a channel without users, and the bdev when that was its last one."""
        assert slot.opening is not None
        await asyncio.wait([slot.opening])
        if slot.opening.exception() is None:
            await slot.opening.result().close()
            await self._close_bases(slot)
        del self._slots[reactor]
        await self._registry.let_go(self._bdev)

    async def remove(self) -> None:
        """Hot remove: all fail new I/O; returns when none is in flight."""
        slots = list(self._slots.values())
        openings = [slot.opening for slot in slots if slot.opening is not None]
        if openings:
            await asyncio.wait(openings)
        for slot in slots:
            channel = slot.channel
            if slot.closing is None and channel is not None:
                await channel.remove()

    async def wait_closing(self) -> None:
        """Wait for those whose last user has let go already."""
        closing = [slot.closing for slot in self._slots.values() if slot.closing is not None]
        if closing:
            await asyncio.wait(closing)

    async def replace_base(self, index: int, base: Bdev | None) -> None:
        """Have all use another base, or none; returns when the old one is let go.

        Raises: StateError, HostError when a channel of the new one can't open: the bdev then
        has no base there.
        """
        self._bdev.bases[index] = None
        await self._rebase(index, None)
        if base is not None:
            self._bdev.bases[index] = base
            try:
                await self._rebase(index, base)
            except BaseException:
                self._bdev.bases[index] = None
                await self._rebase(index, None)
                raise

    async def _rebase(self, index: int, base: Bdev | None) -> None:
        for reactor, slot in list(self._slots.items()):
            assert slot.opening is not None
            await asyncio.wait([slot.opening])
            channel = slot.channel
            if channel is None:
                continue
            old = slot.bases[index]
            if (old and old.bdev) is base:
                continue
            slot.bases[index] = await self._open_base(base, reactor)
            await channel.set_base(index, slot.bases[index])
            if old is not None:
                await self._registry.close_channel(old)

    @contextlib.asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """Hold new I/O back, and have none in flight meanwhile."""
        async with self._quiet:
            channels = self.open_ones()
            try:
                for answer in [channel.gate() for channel in channels]:
                    await answer
                yield
            finally:
                for answer in [channel.ungate() for channel in channels]:
                    await answer
