"""The error bdev: what fails, how often, and what becomes of what it holds back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from uuid import uuid4

import pytest

from drivebay.bdev.error import OPERATIONS, ErrorBdev, ErrorChannel
from drivebay.bdev.malloc import MallocBdev
from tests.fakes.driver import BlkDriver, Framing, Kind, Pending, Status, segment_bytes
from tests.fakes.memory import adjacent
from tests.fakes.ring import Segment
from tests.fakes.stepped import Machine, malloc_bdev
from tests.fakes.threaded import ThreadedMachine

KINDS = {"read": Kind.IN, "write": Kind.OUT, "flush": Kind.FLUSH, "unmap": Kind.DISCARD}
PATTERN = bytes(range(256)) * 16
MIB = 1 << 20
RETRY_TURNS = 1000  # 10 ms


@pytest.fixture
def base() -> MallocBdev:
    return malloc_bdev()


@pytest.fixture
def bdev(base: MallocBdev) -> ErrorBdev:
    return ErrorBdev("EE_M", uuid4(), base)


@pytest.fixture
def machine(bdev: ErrorBdev) -> Iterator[Machine]:
    with Machine(bdev) as made:
        yield made


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue(128)


@pytest.fixture
def below(base: MallocBdev) -> Iterator[BlkDriver]:
    """The base as it is."""
    with Machine(base) as made:
        yield made.add_queue()


def start(disk: BlkDriver, operation: str, sector: int = 0) -> Pending:
    kind = KINDS[operation]
    data = {Kind.OUT: PATTERN[:512], Kind.DISCARD: segment_bytes(sector, 1)}.get(kind, b"")
    pending = disk.queue(kind, sector, data, room=512 * (kind == Kind.IN))
    disk.publish()
    return pending


def status_of(disk: BlkDriver, operation: str) -> int:
    return disk.wait(start(disk, operation)).status


def resume(machine: Machine) -> None:
    assert isinstance(machine.channel, ErrorChannel)
    machine.settle(machine.channel.resume())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_exactly_so_many_fail_and_only_of_that_kind(
    bdev: ErrorBdev, disk: BlkDriver, operation: str
) -> None:
    bdev.inject(operation, "failure", 3)
    for other in OPERATIONS:
        if other != operation:
            assert status_of(disk, other) == Status.OK
    statuses = [status_of(disk, operation) for _ in range(5)]
    assert statuses == [Status.IOERR] * 3 + [Status.OK] * 2
    assert bdev.left(operation) == 0


def test_write_zeroes_never_fail(bdev: ErrorBdev, disk: BlkDriver) -> None:
    for operation in OPERATIONS:
        bdev.inject(operation, "failure", 3)
    disk.write_zeroes(0, 8)


def test_two_reactors_share_one_count(bdev: ErrorBdev, disk: BlkDriver) -> None:
    bdev.inject("read", "failure", 5)
    with Machine(bdev) as other:
        there = other.add_queue()
        statuses = [status_of(queue, "read") for _ in range(4) for queue in (disk, there)]
    assert statuses == [Status.IOERR] * 5 + [Status.OK] * 3


def test_clearing_ends_it(bdev: ErrorBdev, disk: BlkDriver) -> None:
    bdev.inject("read", "failure", 3)
    bdev.clear("read")
    assert status_of(disk, "read") == Status.OK


def test_a_failed_write_changes_nothing(bdev: ErrorBdev, disk: BlkDriver, below: BlkDriver) -> None:
    bdev.inject("write", "failure", 1)
    assert status_of(disk, "write") == Status.IOERR
    assert below.read(0, 512) == bytes(512)


# ---- by depth -------------------------------------------------------------------------------


def test_it_waits_for_the_queue_depth(bdev: ErrorBdev, disk: BlkDriver) -> None:
    bdev.inject("read", "failure", 10, queue_depth=2)
    assert status_of(disk, "read") == Status.OK
    batch = [disk.queue(Kind.IN, i, room=512) for i in range(5)]
    disk.publish()
    # The first two of the batch find fewer than two with the base.
    statuses = [disk.wait(pending).status for pending in batch]
    assert statuses == [Status.OK] * 2 + [Status.IOERR] * 3


def test_what_is_held_back_does_not_count_as_depth(
    machine: Machine, bdev: ErrorBdev, disk: BlkDriver
) -> None:
    bdev.inject("read", "pending", 2)
    held = [start(disk, "read", i) for i in range(2)]
    machine.step(5)
    bdev.inject("write", "failure", 1, queue_depth=1)
    assert status_of(disk, "write") == Status.OK
    bdev.clear_pending()
    resume(machine)
    assert all(disk.wait(pending).status == Status.OK for pending in held)


# ---- pending --------------------------------------------------------------------------------


def test_pending_waits_until_it_is_resumed(
    machine: Machine, bdev: ErrorBdev, disk: BlkDriver, below: BlkDriver
) -> None:
    bdev.inject("write", "pending", 100)
    held = [start(disk, "write", i) for i in range(3)]
    machine.step(500)
    assert not disk.collect()
    assert status_of(disk, "read") == Status.OK
    bdev.clear_pending()
    resume(machine)
    assert [disk.wait(pending).status for pending in held] == [Status.OK] * 3
    assert below.read(0, 1536) == PATTERN[:512] * 3
    assert status_of(disk, "write") == Status.OK


def test_resumed_ones_suffer_what_is_injected_now(
    machine: Machine, bdev: ErrorBdev, disk: BlkDriver
) -> None:
    bdev.inject("read", "pending", 1)
    held = start(disk, "read")
    machine.step(5)
    bdev.inject("read", "failure", 1)
    resume(machine)
    assert disk.wait(held).status == Status.IOERR


@pytest.mark.parametrize("kind", ["pending", "nomem"])
def test_removal_ends_what_is_held_back(
    machine: Machine, bdev: ErrorBdev, disk: BlkDriver, kind: str
) -> None:
    bdev.inject("read", kind, 100)
    held = [start(disk, "read", i) for i in range(3)]
    machine.step(5)
    machine.settle(machine.channel.remove())
    assert [disk.wait(pending).status for pending in held] == [Status.IOERR] * 3
    machine.step(2 * RETRY_TURNS)


def test_closing_ends_what_is_held_back(machine: Machine, bdev: ErrorBdev, disk: BlkDriver) -> None:
    bdev.inject("read", "pending", 100)
    held = start(disk, "read")
    machine.step(5)
    machine.settle(machine.channel.close())
    assert disk.wait(held).status == Status.IOERR


def test_without_memory_it_is_tried_again(
    machine: Machine, bdev: ErrorBdev, disk: BlkDriver
) -> None:
    bdev.inject("read", "nomem", 3)
    held = start(disk, "read")
    machine.step(2 * RETRY_TURNS)
    assert not disk.collect()
    machine.step(RETRY_TURNS + 10)
    assert disk.collect() == [held]
    assert held.completion is not None
    assert held.completion.status == Status.OK


# ---- wrong data -----------------------------------------------------------------------------


def wrong(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ value]) + data[offset + 1 :]


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 1000, 4095])
@pytest.mark.parametrize("cuts", [(), (1,), (512, 488, 1, 2), (4095,)])
def test_read_data_is_wrong_once(
    bdev: ErrorBdev, disk: BlkDriver, offset: int, cuts: tuple[int, ...]
) -> None:
    disk.write(8, PATTERN)
    bdev.inject("read", "corrupt_data", 1, corrupt_offset=offset, corrupt_value=0x81)
    framing = Framing(writable=cuts)
    assert disk.read(8, 4096, framing) == wrong(PATTERN, offset, 0x81)
    assert disk.read(8, 4096, framing) == PATTERN


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 1000, 4095])
@pytest.mark.parametrize("cuts", [(16,), (16, 1), (16, 512, 488, 1, 2), (16, 4095)])
def test_written_data_is_wrong_on_the_disk_only(
    bdev: ErrorBdev, disk: BlkDriver, below: BlkDriver, offset: int, cuts: tuple[int, ...]
) -> None:
    bdev.inject("write", "corrupt_data", 1, corrupt_offset=offset, corrupt_value=0xFF)
    disk.write(16, b"-" * 8192)
    assert below.read(16, 8192) == wrong(b"-" * 8192, offset, 0xFF)
    bdev.inject("write", "corrupt_data", 1, corrupt_offset=offset, corrupt_value=0xFF)
    pending = disk.queue(Kind.OUT, 8, PATTERN, framing=Framing(readable=cuts))
    sent = b"".join(disk.memory.read(s.addr, s.length) for s in pending.readable)
    disk.publish()
    assert disk.wait(pending).status == Status.OK
    # Memory that is free again keeps its content until it is given away.
    assert b"".join(disk.memory.read(s.addr, s.length) for s in pending.readable) == sent
    assert below.read(8, 4096) == wrong(PATTERN, offset, 0xFF)
    disk.write(8, PATTERN)
    assert below.read(8, 4096) == PATTERN


def test_more_wrong_writes_at_once_than_there_are_records(
    bdev: ErrorBdev, disk: BlkDriver, below: BlkDriver
) -> None:
    bdev.inject("write", "corrupt_data", 20, corrupt_offset=5, corrupt_value=1)
    batch = [disk.queue(Kind.OUT, i, PATTERN[:512]) for i in range(24)]
    disk.publish()
    assert [disk.wait(pending).status for pending in batch] == [Status.OK] * 24
    found = below.read(0, 24 * 512)
    bad = [i for i in range(24) if found[512 * i : 512 * i + 512] == wrong(PATTERN[:512], 5, 1)]
    assert bad == list(range(20))
    assert found[20 * 512 :] == PATTERN[:512] * 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_offset_behind_the_end_changes_nothing(
    bdev: ErrorBdev, disk: BlkDriver, operation: str
) -> None:
    disk.write(0, PATTERN)
    bdev.inject(operation, "corrupt_data", 1, corrupt_offset=1 << 62, corrupt_value=1)
    assert status_of(disk, operation) == Status.OK
    assert bdev.left(operation) == 0
    if operation != "unmap":
        assert disk.read(0, 4096) == PATTERN


@pytest.mark.parametrize(("crossing", "status"), [(542, Status.OK), (543, Status.IOERR)])
def test_a_write_of_very_many_buffers(
    bdev: ErrorBdev, base: MallocBdev, crossing: int, status: int
) -> None:
    """A buffer across a border of two regions is two for us; a request has room for 1,088."""
    bdev.inject("write", "corrupt_data", 1, corrupt_offset=1000, corrupt_value=1)
    with Machine(bdev, layouts=adjacent([2 * MIB, 2 * MIB])) as machine:
        disk = machine.add_queue(1024)
        border = 3 * MIB
        data = bytes(range(256)) * 2
        head = disk.memory.allocate(528)  # the first of the data behind the header
        disk.memory.write(head, struct.pack("<IIQ", Kind.OUT, 0, 0) + data)
        disk.memory.write(border - 256, data)
        readable = [Segment(head, 528, False), *[Segment(border - 256, 512, False)] * crossing]
        writable = [Segment(disk.memory.allocate(1), 1, True)]
        pending = disk.queue_chain(readable, writable, indirect=True)
        pending.readable.clear()  # they are not to be given back one by one
        disk.publish()
        assert disk.wait(pending).status == status
    with Machine(base) as machine:
        found = machine.add_queue().read(0, 2048)
    assert found == (wrong(data * 4, 1000, 1) if status == Status.OK else bytes(2048))


# ---- on real threads --------------------------------------------------------------------------


def test_two_threads_count_exactly(bdev: ErrorBdev) -> None:
    bdev.inject("read", "failure", 1000)
    statuses = []
    with ThreadedMachine(bdev) as one, ThreadedMachine(bdev) as two:
        disks = [machine.add_queue(128) for machine in (one, two)]
        for _ in range(40):
            batches = [[disk.queue(Kind.IN, i, room=512) for i in range(16)] for disk in disks]
            for disk in disks:
                disk.publish()
            for disk, batch in zip(disks, batches, strict=True):
                statuses += [disk.wait(pending).status for pending in batch]
    assert len(statuses) == 1280
    assert statuses.count(Status.IOERR) == 1000
    assert bdev.left("read") == 0
