"""One virtqueue of ours, moved only by hand: no thread, no socket, a clock that we turn.

The only fake that imports drivebay: it puts the driver of tests.fakes on the doors of
dataplane, bdev, reactor and memory. Context: tests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from drivebay.bdev.base import Bdev, Channel
from drivebay.bdev.malloc import MallocBdev
from drivebay.dataplane.blk_queue import BlkQueue
from drivebay.dataplane.inflight import InflightQueue
from drivebay.memory.guest_memory import MemoryTable, Region
from drivebay.reactor.mailbox import Answer, ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_RING_PACKED,
    F_VERSION_1,
    AnyRing,
    BlkDriver,
    EventPort,
    make_ring,
)
from tests.fakes.memory import APART, GuestMemory, Layout

TICK = 10_000
PATIENCE_S = 10.0
FEATURES = 1 << F_VERSION_1 | 1 << F_INDIRECT | 1 << F_EVENT_IDX
PACKED = FEATURES | 1 << F_RING_PACKED
SERIAL = b"stepped"


def malloc_bdev(*, block_size: int = 512, size_bytes: int = 1 << 20) -> MallocBdev:
    return MallocBdev("Malloc0", None, block_size, size_bytes // block_size)


def table_of(memory: GuestMemory, previous: MemoryTable | None = None) -> MemoryTable:
    """The memory as our side sees it, from the same descriptions a front end would send."""
    regions = [
        Region(r.guest_addr, r.size, r.user_addr, r.mmap_offset, r.fd) for r in memory.regions
    ]
    return MemoryTable(regions, previous)


class SteppedPort(EventPort):
    """Waiting for the device means letting it take a turn."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def wait(self, seconds: float) -> None:
        self.machine.step()


class Machine:
    """A reactor, a disk, guest memory, and as many queues as asked for."""

    def __init__(
        self,
        bdev: Bdev | None = None,
        *,
        layouts: Sequence[Layout] = APART,
        features: int = FEATURES,
        readonly: bool = False,
        write_through: bool = False,
        core: int = 0,
        poll_us: int = 50,
    ) -> None:
        self.now = 1_000_000_000
        self.features = features
        self.readonly = readonly
        self.write_through = write_through
        self.memory = GuestMemory(layouts)
        self.table = table_of(self.memory)
        self._older_tables: list[MemoryTable] = []
        self.control = ControlMailbox()
        self.reactor = Reactor(core, self.control, poll_us)
        self.bdev = bdev if bdev is not None else malloc_bdev()
        self._below: list[Channel] = []
        self.channel = self.open(self.bdev)
        self._dead_channels: list[Channel] = []
        self.queues: list[BlkQueue] = []
        self.ports: list[EventPort] = []
        self.broken: list[BlkQueue] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, bdev: Bdev) -> Channel:
        """A channel of a bdev, on channels of its bases, as the registry opens them."""
        bases = [None if base is None else self.open(base) for base in bdev.bases]
        self._below += [base for base in bases if base is not None]
        channel = bdev.open_channel(self.reactor, *bases)
        self.settle(channel.activate())
        return channel

    def step(self, turns: int = 1) -> int:
        """Turns of the reactor's loop, the clock going on by 10 µs each; returns work done."""
        done = 0
        for _ in range(turns):
            self.now += TICK
            done += self.reactor.step(self.now)
            self.control.drain()
        return done

    def settle(self, answer: Answer) -> int:
        """Step until the reactor has answered."""
        deadline = time.monotonic() + PATIENCE_S
        while not answer.done:
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer within {PATIENCE_S} s")
            self.step()
        return answer.result()

    def add_queue(
        self,
        size: int = 16,
        *,
        start: int = 0,
        ring: AnyRing | None = None,
        inflight: InflightQueue | None = None,
    ) -> BlkDriver:
        """A started queue and its driver."""
        if ring is None:
            ring = make_ring(self.features, self.memory, size, start)
        queue = self.prepare_queue(ring, inflight=inflight)
        port = self.make_port()
        self.ports.append(port)
        self.settle(queue.start(port.kick_fd, port.call_fd, port.err_fd))
        self.settle(queue.set_enabled(True))
        return BlkDriver(ring, port)

    def make_port(self) -> EventPort:
        return SteppedPort(self)

    def prepare_queue(
        self, ring: AnyRing, base: int | None = None, inflight: InflightQueue | None = None
    ) -> BlkQueue:
        """A queue on a ring, not started yet; ``base`` for another than the ring's own."""
        memory = self.memory
        queue = BlkQueue(
            self.channel,
            self.table,
            index=len(self.queues),
            size=ring.size,
            desc=memory.user_addr(ring.desc),
            avail=memory.user_addr(ring.avail),
            used=memory.user_addr(ring.used),
            base=ring.base if base is None else base,
            features=self.features,
            readonly=self.readonly,
            write_through=self.write_through,
            serial=SERIAL,
            on_broken=self.broken.append,
            inflight=inflight,
        )
        self.queues.append(queue)
        return queue

    def gate_forever(self) -> None:
        """What is in flight now never comes back, as if we had died; go on with a new channel."""
        self.settle(self.channel.gate())
        self._dead_channels.append(self.channel)
        self.channel = self.bdev.open_channel(self.reactor)
        self.settle(self.channel.activate())

    def new_table(self) -> MemoryTable:
        """A table of the same memory as it is now; the older one lives until close()."""
        self._older_tables.append(self.table)
        self.table = table_of(self.memory, self.table)
        return self.table

    def stop_queue(self, index: int) -> int:
        """Stop one queue; returns where it stands."""
        return self.settle(self.queues[index].stop())

    def end_reactor(self) -> None:
        """A stepped one has no end."""

    def close(self) -> None:
        for channel in self._dead_channels:
            self.settle(channel.ungate())
        for queue in self.queues:
            self.settle(queue.stop())
        for channel in (*self._dead_channels, self.channel):
            self.settle(channel.close())
        for table in (*self._older_tables, self.table):
            table.release()
        self.bdev.close()
        self.end_reactor()
        self.reactor.close()
        for port in self.ports:
            port.close()
        self.memory.close()
