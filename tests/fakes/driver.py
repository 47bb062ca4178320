"""A virtio-blk driver in pure Python: virtio 1.3 §5.2 over the rings of tests.fakes.ring.

It knows a ring, memory and a port (how to kick, how to wait), so the same driver speaks to a
process over a socket and to a queue that is stepped by hand. Never imports drivebay.
Context: tests.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from tests.fakes import front_end as vu
from tests.fakes.memory import APART, GuestMemory, Layout
from tests.fakes.packed_ring import PackedRing
from tests.fakes.ring import Segment, SplitRing

SECTOR = 512
STATUS_UNTOUCHED = 0xEE

F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1, 2, 5, 6, 9
F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 10, 11, 12, 13, 14
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_RING_PACKED = 28, 29, 32, 34


AnyRing = SplitRing | PackedRing


def make_ring(features: int, memory: GuestMemory, size: int, start: int = 0) -> AnyRing:
    """A ring of the kind that these features call for."""
    kind = PackedRing if features >> F_RING_PACKED & 1 else SplitRing
    return kind(memory, size, event_idx=bool(features >> F_EVENT_IDX & 1), start=start)


class Kind(IntEnum):
    """Request types (§5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class Status(IntEnum):
    """Status byte (§5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    UNTOUCHED = STATUS_UNTOUCHED


class Completion(NamedTuple):
    """What came back: status byte, used length, and the bytes the device may have written."""

    status: int
    used_length: int
    data: bytes


class Framing(NamedTuple):
    """Where the readable and the writable bytes of a request are cut into buffers.

    §2.7.4 leaves framing free: a cut list holds the lengths of all buffers but the last.
    ``None`` is what common drivers do: header alone, status alone.
    """

    readable: tuple[int, ...] | None = None
    writable: tuple[int, ...] | None = None
    indirect: bool = False


PLAIN = Framing()


class Port(Protocol):
    """How a ring's driver reaches the device."""

    def kick(self) -> None: ...
    def wait(self, seconds: float) -> None:
        """Let the device work; return when it may have, at the latest after ``seconds``."""


class EventPort:
    """Kick and call eventfds, owned here. A notification that never comes is noticed:

    wait() sleeps until there is one, unless ``patience`` bounds it.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.kicks = 0
        self._poll = select.poll()
        self._poll.register(self.call_fd, select.POLLIN)

    def kick(self) -> None:
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def wait(self, seconds: float) -> None:
        if self.patience is not None:
            seconds = min(seconds, self.patience)
        if self._poll.poll(seconds * 1000):
            self.take_calls()

    def take_calls(self) -> int:
        """How often the device notified since last asked."""
        return _take(self.call_fd)

    def take_errors(self) -> int:
        return _take(self.err_fd)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


def _take(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@dataclass
class Pending:
    """One request in flight: its buffers, and where its answer will be."""

    head: int  # in a packed ring: the buffer id
    readable: list[Segment]
    writable: list[Segment]
    completion: Completion | None = None


class BlkDriver:
    """Requests on one ring. Never more than the ring has room for."""

    def __init__(self, ring: AnyRing, port: Port, *, timeout: float = 30.0) -> None:
        self.any_ring = ring
        self.memory = ring.memory
        self.port = port
        self.timeout = timeout
        self.pending: dict[int, Pending] = {}

    @property
    def ring(self) -> SplitRing:
        """For a test of split rings only."""
        assert isinstance(self.any_ring, SplitRing)
        return self.any_ring

    @property
    def packed(self) -> PackedRing:
        """For a test of packed rings only."""
        assert isinstance(self.any_ring, PackedRing)
        return self.any_ring

    # ---- any request ---------------------------------------------------------------------

    def queue(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        framing: Framing = PLAIN,
        reserved: int = 0,
    ) -> Pending:
        """Put a request into the ring, not yet published."""
        out = struct.pack("<IIQ", kind, reserved, sector) + data
        out_cuts = (16,) if framing.readable is None and data else framing.readable or ()
        in_cuts = (room,) if framing.writable is None and room else framing.writable or ()
        readable = [self._buffer(piece, False) for piece in cut(out, out_cuts)]
        answer = bytes([STATUS_UNTOUCHED]) * (room + 1)
        writable = [self._buffer(piece, True) for piece in cut(answer, in_cuts)]
        return self.queue_chain(readable, writable, indirect=framing.indirect)

    def queue_chain(
        self, readable: list[Segment], writable: list[Segment], *, indirect: bool = False
    ) -> Pending:
        """Put any chain into the ring, not yet published."""
        head = self.any_ring.add([*readable, *writable], indirect=indirect)
        pending = Pending(head, readable, writable)
        self.pending[head] = pending
        return pending

    def publish(self) -> bool:
        """Show all queued requests at once, and kick only if asked to. True if kicked."""
        wanted = self.any_ring.publish()
        if wanted:
            self.port.kick()
        return wanted

    def collect(self) -> list[Pending]:
        """Completions that are here now, in the order of the used ring."""
        done = []
        for used in self.any_ring.take_used():
            pending = self.pending.pop(used.head)
            answer = b"".join(self.memory.read(s.addr, s.length) for s in pending.writable)
            status = answer[-1] if answer else STATUS_UNTOUCHED
            pending.completion = Completion(status, used.length, answer[:-1])
            for segment in (*pending.readable, *pending.writable):
                self.memory.free(segment.addr, segment.length)
            done.append(pending)
        return done

    def wait(self, pending: Pending) -> Completion:
        """Until that one is complete. Raises TimeoutError."""
        deadline = time.monotonic() + self.timeout
        while pending.completion is None:
            if self.collect():
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"request at head {pending.head} is not answered")
            self.port.wait(left)
        return pending.completion

    def wait_all(self) -> None:
        """Until nothing is in flight."""
        for pending in list(self.pending.values()):
            self.wait(pending)

    def forget(self) -> None:
        """The device let go of the ring: whatever was not answered never will be."""
        for pending in self.pending.values():
            for segment in (*pending.readable, *pending.writable):
                self.memory.free(segment.addr, segment.length)
        self.pending.clear()
        self.any_ring.release()

    def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        framing: Framing = PLAIN,
    ) -> Completion:
        """One request from start to end."""
        pending = self.queue(kind, sector, data, room, framing)
        self.publish()
        return self.wait(pending)

    def _buffer(self, content: bytes, writable: bool) -> Segment:
        addr = self.memory.allocate(len(content))
        self.memory.write(addr, content)
        return Segment(addr, len(content), writable)

    # ---- the requests by name --------------------------------------------------------------

    def read(self, sector: int, length: int, framing: Framing = PLAIN) -> bytes:
        done = self.request(Kind.IN, sector, room=length, framing=framing)
        expect_ok(done, f"read of {length} bytes at sector {sector}")
        return done.data

    def write(self, sector: int, data: bytes, framing: Framing = PLAIN) -> None:
        done = self.request(Kind.OUT, sector, data, framing=framing)
        expect_ok(done, f"write of {len(data)} bytes at sector {sector}")

    def flush(self) -> None:
        expect_ok(self.request(Kind.FLUSH), "flush")

    def get_id(self) -> bytes:
        done = self.request(Kind.GET_ID, room=20)
        expect_ok(done, "get id")
        return done.data

    def discard(self, sector: int, sectors: int) -> None:
        done = self.request(Kind.DISCARD, data=segment_bytes(sector, sectors))
        expect_ok(done, "discard")

    def write_zeroes(self, sector: int, sectors: int, *, unmap: bool = False) -> None:
        data = segment_bytes(sector, sectors, int(unmap))
        expect_ok(self.request(Kind.WRITE_ZEROES, data=data), "write zeroes")


def segment_bytes(sector: int, sectors: int, flags: int = 0) -> bytes:
    """One segment of a discard or write zeroes request (§5.2.6)."""
    return struct.pack("<QII", sector, sectors, flags)


def expect_ok(done: Completion, what: str) -> None:
    if done.status != Status.OK:
        raise AssertionError(f"{what}: status {done.status}, used length {done.used_length}")


def cut(data: bytes, lengths: Sequence[int]) -> Iterator[bytes]:
    """The pieces of those lengths, and whatever is left."""
    at = 0
    for length in lengths:
        yield data[at : at + length]
        at += length
    if at < len(data):
        yield data[at:]


class Session:
    """A whole front end with some queues: what a guest with one disk is to its target."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queues: int = 1,
        size: int = 64,
        layouts: Sequence[Layout] = APART,
        without: Sequence[int] = (),
        start: int = 0,
        timeout: float = 30.0,
        region: vu.Inflight | None = None,
    ) -> None:
        """``without``: virtio feature bits that we do not take though offered.

        ``region``: where the target shall keep what is in flight; its descriptor is borrowed.
        """
        self.memory = GuestMemory(layouts)
        self.front_end = vu.FrontEnd(path, timeout=timeout)
        self.ports: list[EventPort] = []
        self.drivers: list[BlkDriver] = []
        self.timeout = timeout
        try:
            self._negotiate(without)
            if region is not None:
                self.front_end.set_inflight_fd(region)
            self.front_end.set_mem_table(self.memory)
            for index in range(queues):
                self.start_queue(index, size, start)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _negotiate(self, without: Sequence[int]) -> None:
        front = self.front_end
        offered = front.get_features()
        wanted = {F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_MQ}
        wanted |= {F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES, F_INDIRECT, F_EVENT_IDX, F_VERSION_1}
        wanted.add(F_RING_PACKED)
        mask = sum(1 << bit for bit in wanted - set(without))
        if offered >> vu.F_PROTOCOL_FEATURES & 1:
            ours = sum(1 << bit for bit in vu.Protocol)
            front.set_protocol_features(front.get_protocol_features() & ours)
            mask |= 1 << vu.F_PROTOCOL_FEATURES
        front.set_owner()
        front.set_features(offered & mask)
        if front.has(vu.Protocol.STATUS):
            front.set_status(0x0F)  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK

    def prepare_queue(self, size: int = 64, start: int = 0) -> BlkDriver:
        """A ring and its eventfds, of which the target knows nothing yet."""
        ring = make_ring(self.front_end.features, self.memory, size, start)
        port = EventPort()
        self.ports.append(port)
        return BlkDriver(ring, port, timeout=self.timeout)

    def start_queue(self, index: int, size: int = 64, start: int = 0) -> BlkDriver:
        """Make a ring and start it as queue ``index``; returns its driver."""
        driver = self.prepare_queue(size, start)
        if index < len(self.drivers):
            self.drivers[index] = driver
            self.ports[index].close()
            self.ports[index] = self.ports.pop()
        else:
            self.drivers.append(driver)
        self.start_queue_on(index, driver.any_ring, self.ports[index])
        return driver

    def start_queue_on(self, index: int, ring: AnyRing, port: EventPort) -> None:
        """Start queue ``index`` on a ring that is there, in the order QEMU uses."""
        front = self.front_end
        front.set_vring_num(index, ring.size)
        front.set_vring_base(index, ring.base)
        self.set_addresses(index, ring)
        front.set_vring_kick(index, port.kick_fd)
        front.set_vring_call(index, port.call_fd)
        front.set_vring_err(index, port.err_fd)
        if front.features >> vu.F_PROTOCOL_FEATURES & 1:
            front.set_vring_enable(index)

    def start_again(self, index: int) -> BlkDriver:
        """After GET_VRING_BASE: give the old ring's memory back and start with a new one."""
        old = self.drivers[index]
        old.forget()
        return self.start_queue(index, old.any_ring.size)

    def set_addresses(self, index: int, ring: AnyRing) -> None:
        memory = self.memory
        self.front_end.set_vring_addr(
            index,
            memory.user_addr(ring.desc),
            memory.user_addr(ring.avail),
            memory.user_addr(ring.used),
        )

    @property
    def disk(self) -> BlkDriver:
        return self.drivers[0]

    def capacity(self) -> int:
        """Sectors, from configuration space."""
        (sectors,) = struct.unpack("<Q", self.front_end.get_config(0, 8))
        return int(sectors)

    def close(self) -> None:
        self.front_end.close()
        for port in self.ports:
            port.close()
        self.ports = []
        self.memory.close()
