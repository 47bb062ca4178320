"""All rings of one session, and the guest memory and channels that they need.

Context: control, under the session's lock, so one change at a time. Whatever
waits for a reactor here waits through ``wait``, which notices a hang-up: a
change may be left half done then, and drain() copes with that, because every
queue, table and channel is on a list here before anything waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Protocol

from drivebay.bdev.base import Channel
from drivebay.dataplane.blk_queue import BlkQueue
from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.errors import PeerError
from drivebay.memory.guest_memory import MemoryTable, Region
from drivebay.reactor.mailbox import Answer
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.recovery import Recovery
from drivebay.vhost.ring import Coalescing, DeviceTerms, Ring

__all__ = ["Disk", "Rings", "Wait"]

Wait = Callable[[Sequence[Answer], str], Awaitable[None]]


class Disk(Protocol):
    """Where a session gets its channels; the controller is one."""

    def reactor_for(self, session_id: int, index: int) -> Reactor:
        """Who serves queue ``index`` of that session."""

    async def open_channel(self, reactor: Reactor) -> Channel:
        """Raises: HostError, StateError."""

    async def close_channel(self, channel: Channel) -> None: ...


class Rings:
    """The rings of one session."""

    def __init__(
        self,
        session_id: int,
        disk: Disk,
        terms: Callable[[], DeviceTerms],
        wait: Wait,
        on_ring_broken: Callable[[Ring, str], None],
        on_memory_broken: Callable[[], None],
        on_suspended: Callable[[Ring], None],
    ) -> None:
        self._session_id = session_id
        self._disk = disk
        self._terms = terms
        self._wait = wait
        self._on_ring_broken = on_ring_broken
        self._on_memory_broken = on_memory_broken
        self._on_suspended = on_suspended
        self.recovery: Recovery | None = None  # set by the session: where requests are kept
        self._rings: dict[int, Ring] = {}
        self._enabled_from_the_start = False
        self._channels: dict[Reactor, Channel] = {}
        self._table: MemoryTable | None = None
        self._tables: list[MemoryTable] = []
        self._log: DirtyLog | None = None

    def __getitem__(self, index: int) -> Ring:
        ring = self._rings.get(index)
        if ring is None:
            ring = self._rings[index] = Ring(index)
            ring.enabled = self._enabled_from_the_start
        return ring

    def __iter__(self) -> Iterator[Ring]:
        return iter(self._rings.values())

    @property
    def started(self) -> int:
        """How many rings are started."""
        return sum(ring.started for ring in self)

    @property
    def inflight(self) -> int:
        return sum(ring.queue.counters().inflight for ring in self if ring.queue is not None)

    @property
    def busy_ticks(self) -> int:
        return sum(ring.busy_ticks for ring in self)

    @property
    def channels(self) -> Collection[Channel]:
        return self._channels.values()

    @property
    def broken(self) -> bool:
        return any(ring.queue is not None and ring.queue.broken is not None for ring in self)

    # Starting and stopping --------------------------------------------------------------

    async def start(self, ring: Ring) -> None:
        """Serve a ring that has just become startable. Raises: PeerError, HostError."""
        if self._table is None:
            raise PeerError(
                f"queue {ring.index} starts, but no guest memory is shared",
                hint="start QEMU with -object memory-backend-memfd,share=on",
            )
        ring.check_place(self._table, self._terms())
        await self._serve(ring, self._table)

    async def _serve(self, ring: Ring, table: MemoryTable) -> None:
        reactor = self._disk.reactor_for(self._session_id, ring.index)
        channel = self._channels.get(reactor)
        if channel is None:
            channel = self._channels[reactor] = await self._disk.open_channel(reactor)

        def on_broken(queue: BlkQueue) -> None:
            self._on_ring_broken(ring, queue.broken or "unknown cause")

        terms = self._terms()
        inflight = None
        if self.recovery is not None:
            inflight = self.recovery.queue(ring.index, terms.features)
        answers = ring.start(channel, table, terms, on_broken, self._log, inflight)
        await self._wait(answers, "to start a queue")

    async def stop(self, rings: Sequence[Ring], why: str) -> None:
        """Stop these and wait until nothing of them is in flight."""
        await self._wait([answer for ring in rings for answer in ring.stop()], why)
        for ring in rings:
            ring.stopped()

    async def _resume(self, ring: Ring) -> None:
        """Serve a started ring that has no queue, or leave it suspended."""
        if self._table is None or not ring.started or ring.queue is not None:
            return
        if _lies_in(ring, self._table, self._terms()):
            await self._serve(ring, self._table)
        else:
            self._on_suspended(ring)

    async def set_enabled(self, ring: Ring, enabled: bool) -> None:
        await self._wait(ring.set_enabled(enabled), "to enable or disable a queue")

    async def enable_all(self) -> None:
        """SET_FEATURES without VHOST_USER_F_PROTOCOL_FEATURES: all rings, now and later."""
        self._enabled_from_the_start = True
        await self._wait([a for ring in self for a in ring.set_enabled(True)], "to enable queues")

    async def stop_all(self, why: str) -> None:
        rings = list(self)
        await self.stop(rings, why)
        for ring in rings:
            ring.drop_kick()

    async def reset(self) -> None:
        """RESET_DEVICE: stop all rings and forget what was said about them."""
        await self.stop_all("for a reset (RESET_DEVICE)")
        self._enabled_from_the_start = False
        for ring in self:
            ring.forget()

    async def notifiers_changed(self, ring: Ring) -> None:
        await self._wait(ring.notifiers_changed(), "to change descriptors")
        ring.close_retired()

    async def set_write_through(self, write_through: bool) -> None:
        queues = [ring.queue for ring in self if ring.queue is not None]
        await self._wait(
            [queue.set_write_through(write_through) for queue in queues], "to change its cache mode"
        )

    async def set_coalescing(self, coalescing: Coalescing) -> None:
        queues = [ring.queue for ring in self if ring.queue is not None]
        await self._wait(
            [queue.set_coalescing(*coalescing) for queue in queues], "to change its coalescing"
        )

    async def rebalance(self, wait: Wait) -> None:
        """Move queues to the reactors that the disk names now.

        Each drains where it is and goes on elsewhere at the same place of its ring, so no
        request is lost, and what a guest kicks for meanwhile is found at the new start.
        """
        moving = [
            ring
            for ring in self
            if ring.queue is not None
            and ring.reactor is not self._disk.reactor_for(self._session_id, ring.index)
        ]
        await wait([a for ring in moving for a in ring.stop()], "to move queues to other cores")
        for ring in moving:
            ring.stopped()
        for ring in moving:
            await self._resume(ring)
        used = {ring.reactor for ring in self if ring.queue is not None}
        for reactor in [reactor for reactor in self._channels if reactor not in used]:
            await self._disk.close_channel(self._channels.pop(reactor))

    # Migration --------------------------------------------------------------------------

    async def log_to(self, log: DirtyLog | None) -> None:
        """Mark what is written in this log from now on; done when no queue uses the former."""
        self._log = log
        await self.logging_changed(list(self))

    async def logging_changed(self, rings: Sequence[Ring]) -> None:
        """Tell their queues what to mark, and where."""
        answers = [answer for ring in rings for answer in ring.log_to(self._log)]
        await self._wait(answers, "to change its dirty log")

    # Guest memory -----------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that are mapped now, without descriptors: those are closed long ago."""
        return tuple(
            region._replace(fd=-1) for region in (self._table.regions if self._table else ())
        )

    async def switch_memory(self, regions: Sequence[Region], why: str) -> None:
        """Take a new memory table; returns when the old one is used no more, and unmapped.

        A region with descriptor -1 is one of the present table's and keeps its mapping.
        A running ring follows its memory; one whose memory went away is suspended until it
        is back.
        Raises: PeerError, HostError.
        """
        old = self._table
        new: MemoryTable | None = None
        if regions:
            new = await asyncio.to_thread(MemoryTable, regions, old, self._on_memory_broken)
            self._tables.append(new)
        homeless: list[Ring] = []
        answers: list[Answer] = []
        for ring in self:
            if ring.queue is None:
                continue
            if new is not None and _lies_in(ring, new, self._terms()):
                answers.append(ring.queue.set_table(new))
            else:
                homeless.append(ring)
                answers.extend(ring.stop())
        self._table = new
        await self._wait(answers, why)
        for ring in homeless:
            ring.stopped()
        for ring in list(self):
            await self._resume(ring)
        if old is not None:
            await asyncio.to_thread(old.release)
            self._tables.remove(old)

    # Channels, and the end --------------------------------------------------------------

    async def leave_disk(self, wait: Wait) -> None:
        """Hot remove: the bdev's channels are given back; open_channel gives others now."""
        served = [ring for ring in self if ring.queue is not None]
        await wait([a for ring in served for a in ring.stop()], "because it is removed")
        for ring in served:
            ring.stopped()
        await self._close_channels()
        for ring in served:
            await self._resume(ring)

    async def _close_channels(self) -> None:
        while self._channels:
            _reactor, channel = self._channels.popitem()
            await self._disk.close_channel(channel)

    async def drain(self, wait: Wait) -> None:
        """The end: stop everything, however long it takes, then give everything back."""
        rings = list(self)
        await wait([answer for ring in rings for answer in ring.stop()], "to end a session")
        for ring in rings:
            ring.stopped()
            ring.close()
        tables, self._tables, self._table = self._tables, [], None
        for table in tables:
            await asyncio.to_thread(table.release)
        await self._close_channels()


def _lies_in(ring: Ring, table: MemoryTable, terms: DeviceTerms) -> bool:
    try:
        ring.check_place(table, terms)
    except PeerError:
        return False
    return True
