"""Random requests, framings, memory layouts and batches against a bytearray that is the disk.

The model says what each request must answer; the machine is our queue, stepped by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_RING_PACKED,
    F_VERSION_1,
    STATUS_UNTOUCHED,
    BlkDriver,
    Completion,
    Framing,
    Kind,
    Pending,
    Status,
    segment_bytes,
)
from tests.fakes.memory import PAGE, Layout, adjacent
from tests.fakes.stepped import SERIAL, Machine, malloc_bdev

DISK_BYTES = 64 << 10
SECTORS = DISK_BYTES // 512
ROOM_MAX = 8192
COMMON = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


class Wish(NamedTuple):
    """One request as hypothesis draws it."""

    kind: int
    sector: int
    length: int
    fill: int
    flags: int
    cuts: tuple[int, ...]
    indirect: bool


sectors = st.one_of(st.integers(0, SECTORS + 2), st.sampled_from([1 << 54, 1 << 55, (1 << 64) - 1]))
lengths = st.one_of(
    st.integers(0, ROOM_MAX // 512).map(lambda n: 512 * n),
    st.sampled_from([1, 100, 511, 513, 4095]),
)
wishes = st.builds(
    Wish,
    kind=st.sampled_from([Kind.IN, Kind.OUT] * 3 + [*Kind, 77]),
    sector=sectors,
    length=lengths,
    fill=st.integers(0, 255),
    flags=st.sampled_from([0, 0, 0, 1, 2]),
    cuts=st.lists(st.integers(1, 700), max_size=6).map(tuple),
    indirect=st.booleans(),
)


class Model:
    """The disk as §5.2.6 and our own promises describe it."""

    def __init__(self, block_size: int, readonly: bool) -> None:
        self.bytes = bytearray(DISK_BYTES)
        self.block_size = block_size
        self.readonly = readonly

    def answer(self, wish: Wish) -> Completion:
        """What must come back; ``data`` is what the driver finds in its writable buffer."""
        room = room_of(wish)
        untouched = bytes([STATUS_UNTOUCHED]) * room
        status = self.status(wish)
        if status != Status.OK or not room:
            return Completion(status, 1, untouched)
        if wish.kind == Kind.GET_ID:
            return Completion(status, 21, SERIAL.ljust(20, b"\0"))
        start = 512 * wish.sector
        return Completion(status, room + 1, bytes(self.bytes[start : start + room]))

    def status(self, wish: Wish) -> Status:
        """Check and, if it is to succeed, act."""
        if wish.kind in (Kind.FLUSH, Kind.GET_ID):
            return Status.OK
        if wish.kind in (Kind.IN, Kind.OUT):
            return self.transfer(wish)
        if wish.kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            return self.clear(wish)
        return Status.UNSUPP

    def transfer(self, wish: Wish) -> Status:
        if wish.kind == Kind.OUT and self.readonly:
            return Status.IOERR
        if wish.length == 0 or wish.length % 512:
            return Status.UNSUPP
        if not self.reachable(wish.sector, wish.length):
            return Status.IOERR
        if wish.kind == Kind.OUT:
            start = 512 * wish.sector
            self.bytes[start : start + wish.length] = payload_of(wish)
        return Status.OK

    def clear(self, wish: Wish) -> Status:
        if self.readonly:
            return Status.IOERR
        length = wish.length // 512 * 512
        if wish.flags & ~1 or (wish.flags and wish.kind == Kind.DISCARD):
            return Status.UNSUPP
        if length == 0:  # clears nothing, wherever that is
            return Status.OK if wish.sector < 1 << 55 else Status.IOERR
        if not self.reachable(wish.sector, length):
            return Status.IOERR
        # What a discarded block reads is open by §5.2.6; a disk in memory gives zeroes.
        self.bytes[512 * wish.sector : 512 * wish.sector + length] = bytes(length)
        return Status.OK

    def reachable(self, sector: int, length: int) -> bool:
        start = 512 * sector
        aligned = start % self.block_size == 0 and length % self.block_size == 0
        return aligned and start + length <= DISK_BYTES


def room_of(wish: Wish) -> int:
    if wish.kind == Kind.GET_ID:
        return 20
    return wish.length if wish.kind == Kind.IN else 0


def payload_of(wish: Wish) -> bytes:
    """A pattern in which each byte tells where it belongs."""
    return bytes((wish.fill + i // 7) & 0xFF for i in range(wish.length))


def data_of(wish: Wish) -> bytes:
    if wish.kind == Kind.OUT:
        return payload_of(wish)
    if wish.kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
        return segment_bytes(wish.sector, wish.length // 512, wish.flags)
    return b""


def queue(disk: BlkDriver, wish: Wish) -> Pending:
    framing = Framing(wish.cuts, wish.cuts, wish.indirect)
    sector = 0 if wish.kind in (Kind.DISCARD, Kind.WRITE_ZEROES) else wish.sector
    return disk.queue(wish.kind, sector, data_of(wish), room_of(wish), framing)


def run(machine: Machine, model: Model, batches: Sequence[Sequence[Wish]]) -> None:
    disk = machine.add_queue(64, start=65500)
    for batch in batches:
        for wish in batch:  # one after the other: each sees what the one before has done
            pending = queue(disk, wish)
            expected = model.answer(wish)
            disk.publish()
            assert disk.wait(pending) == expected, wish
    assert disk.read(0, DISK_BYTES) == bytes(model.bytes)
    assert machine.queues[0].broken is None
    assert machine.queues[0].counters().bad_requests == 0


features = st.builds(
    lambda *bits: 1 << F_VERSION_1 | 1 << F_INDIRECT | sum(bits),
    st.sampled_from([0, 1 << F_EVENT_IDX]),
    st.sampled_from([0, 1 << F_RING_PACKED]),
)


@COMMON
@given(
    batches=st.lists(st.lists(wishes, min_size=1, max_size=5), min_size=1, max_size=6),
    block_size=st.sampled_from([512, 4096]),
    readonly=st.booleans(),
    negotiated=features,
)
def test_any_stream_of_requests_answers_as_the_model(
    batches: list[list[Wish]], block_size: int, readonly: bool, negotiated: int
) -> None:
    bdev = malloc_bdev(block_size=block_size, size_bytes=DISK_BYTES)
    with Machine(bdev, features=negotiated, readonly=readonly) as machine:
        run(machine, Model(block_size, readonly), batches)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, ...]:
    """Up to eight regions: some adjacent and small, so that buffers fall across borders."""
    pages = draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))
    where = draw(st.integers(0, 7).filter(lambda at: at <= len(pages)))
    sizes = [PAGE * n for n in pages]
    sizes.insert(where, 512 << 10)  # the ring needs one that is large enough
    return adjacent(sizes, guest_addr=PAGE * draw(st.sampled_from([1, 1 << 20, 1 << 30])))


@COMMON
@given(
    layout=layouts(),
    batches=st.lists(st.lists(wishes, min_size=1, max_size=4), max_size=4),
    negotiated=features,
)
def test_borders_of_memory_regions_do_not_show(
    layout: tuple[Layout, ...], batches: list[list[Wish]], negotiated: int
) -> None:
    bdev = malloc_bdev(size_bytes=DISK_BYTES)
    with Machine(bdev, layouts=layout, features=negotiated) as machine:
        run(machine, Model(512, False), batches)


@COMMON
@given(
    wanted=st.lists(wishes, min_size=1, max_size=30),
    gaps=st.lists(st.integers(0, 8), min_size=30, max_size=30),
    start=st.sampled_from([0, 65500, 65535]),
    negotiated=features,
)
def test_every_request_is_answered_once_whenever_it_is_published(
    wanted: list[Wish], gaps: list[int], start: int, negotiated: int
) -> None:
    """Many in flight, kicked only when asked, at any moment between work and sleep."""
    with Machine(malloc_bdev(size_bytes=DISK_BYTES), features=negotiated) as machine:
        disk = machine.add_queue(512, start=start)
        waiting = []
        for wish, gap in zip(wanted, gaps, strict=False):
            waiting.append(queue(disk, wish))
            if gap:
                disk.publish()
                machine.step(gap)
                disk.collect()
        disk.publish()
        machine.step(100)
        disk.collect()
        assert all(pending.completion is not None for pending in waiting)
        assert machine.queues[0].counters().requests == len(wanted)
