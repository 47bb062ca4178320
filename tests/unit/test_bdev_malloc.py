"""The malloc bdev against a bytearray: clearing at every kind of border, and giving memory back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.bdev.base import Channel
from drivebay.bdev.malloc import MallocBdev
from drivebay.errors import HostError, UsageError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import BlkDriver, Kind, Status, segment_bytes
from tests.fakes.stepped import Machine, malloc_bdev

MIB = 1 << 20
DISK = 6 * MIB
SECTORS = DISK // 512
CHUNK = MIB // 2
UNMAP = 1
# Never zero, and different at the same place of any two pages.
PATTERN = (bytes(range(1, 252)) * (DISK // 251 + 1))[:DISK]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(malloc_bdev(size_bytes=DISK)) as made:
        yield made


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue()


def fill(disk: BlkDriver) -> bytearray:
    model = bytearray(PATTERN)
    for at in range(0, DISK, CHUNK):
        disk.write(at // 512, bytes(model[at : at + CHUNK]))
    return model


def content(disk: BlkDriver) -> bytes:
    return b"".join(disk.read(at // 512, CHUNK) for at in range(0, DISK, CHUNK))


# First sector and number: around pages (8 sectors), pieces (2048) and huge pages (4096).
RANGES = [
    (0, 1),
    (7, 1),
    (7, 2),
    (1, 7),
    (1, 8),
    (1, 14),
    (1, 15),
    (8, 8),
    (0, SECTORS),
    (1, SECTORS - 2),
    (2047, 2),
    (3, 2048),
    (5, 2049),
    (4095, 2050),
    (4096, 4096),
    (SECTORS - 1, 1),
    (SECTORS - 9, 9),
]


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
def test_what_is_cleared_reads_zero_and_nothing_else_does(disk: BlkDriver, kind: Kind) -> None:
    for sector, count in RANGES:
        model = fill(disk)
        flags = UNMAP if kind == Kind.WRITE_ZEROES and sector % 2 else 0
        done = disk.request(kind, data=segment_bytes(sector, count, flags))
        assert done.status == Status.OK
        model[512 * sector : 512 * (sector + count)] = bytes(512 * count)
        assert content(disk) == model, f"clearing {count} sectors from {sector}"


def test_two_long_operations_take_turns_and_reads_go_between(
    machine: Machine, disk: BlkDriver
) -> None:
    fill(disk)
    first = disk.queue(Kind.DISCARD, data=segment_bytes(0, SECTORS // 2))
    second = disk.queue(Kind.DISCARD, data=segment_bytes(SECTORS // 2, SECTORS // 2))
    disk.publish()
    machine.step()
    assert not disk.collect()
    assert disk.read(0, 512) == bytes(512)
    assert disk.read(SECTORS - 1, 512) != bytes(512), "one turn cleared everything"
    disk.wait(first)
    disk.wait(second)
    assert content(disk) == bytes(DISK)


def test_disks_of_one_reactor_share_its_turns(machine: Machine, disk: BlkDriver) -> None:
    """A turn clears one piece, a whole huge page, however many disks are being cleared."""
    others = [malloc_bdev(size_bytes=DISK) for _ in range(3)]
    channels: list[Channel] = [bdev.open_channel(machine.reactor) for bdev in others]
    for channel in channels:
        machine.settle(channel.activate())
    original = machine.channel
    drivers = [disk]
    for channel in channels:
        machine.channel = channel
        drivers.append(machine.add_queue())
    machine.channel = original
    waiting = [d.queue(Kind.DISCARD, data=segment_bytes(0, SECTORS)) for d in drivers]
    for driver in drivers:
        driver.publish()
    turns = 0
    while machine.queues[0].counters().inflight == 0:
        machine.step()
    while any(queue.counters().inflight for queue in machine.queues):
        machine.step()
        turns += 1
    pieces = len(drivers) * DISK // (2 * MIB)
    assert pieces - 2 * len(drivers) <= turns <= pieces + 2
    for driver, pending in zip(drivers, waiting, strict=True):
        assert driver.wait(pending).status == Status.OK
    for index in (1, 2, 3):
        machine.stop_queue(index)
    for channel in channels:
        machine.settle(channel.close())


def test_more_disks_than_any_table_has_places() -> None:
    """Each of them clears more than a piece, so each needs the reactor's engine."""
    control = ControlMailbox()
    with Machine(malloc_bdev(size_bytes=DISK)) as machine:
        crowd = [malloc_bdev(size_bytes=4096) for _ in range(1500)]
        channels = [bdev.open_channel(machine.reactor) for bdev in crowd]
        machine.settle(channels[-1].activate())
        last = malloc_bdev(size_bytes=DISK)
        machine.channel, first = last.open_channel(machine.reactor), machine.channel
        machine.settle(machine.channel.activate())
        disk = machine.add_queue()
        disk.discard(0, SECTORS)
        machine.stop_queue(0)
        machine.settle(machine.channel.close())
        machine.channel = first
    control.drain()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_cleared_memory_goes_back_to_the_host() -> None:
    size = 96 * MIB
    before = resident()
    with Machine(malloc_bdev(size_bytes=size)) as machine:
        assert resident() - before > size // 2, "its memory is taken when it is made"
        disk = machine.add_queue()
        disk.write(0, b"x" * MIB)
        disk.discard(1, size // 512 - 2)
        assert resident() - before < size // 4
        assert disk.read(0, 512) == b"x" * 512


def test_a_disk_gives_its_memory_back_when_it_goes() -> None:
    before = resident()
    for _ in range(20):
        malloc_bdev(size_bytes=32 * MIB).close()
    assert resident() - before < 64 * MIB


def test_it_does_not_grow_beyond_its_memory() -> None:
    """Its blocks lie in one mapping: behind the end is somebody else's memory."""
    bdev = malloc_bdev(size_bytes=DISK)
    with pytest.raises(UsageError, match="cannot grow") as refused:
        bdev.resize(SECTORS + 1)
    assert refused.value.field == "num_blocks"
    assert bdev.num_blocks == SECTORS
    bdev.resize(8)
    bdev.resize(SECTORS)


@pytest.mark.parametrize("size", [1 << 50, (1 << 63) - 512])
def test_a_disk_larger_than_memory_is_refused(size: int) -> None:
    with pytest.raises(HostError, match="malloc bdev 'huge'"):
        MallocBdev("huge", None, 512, size // 512)


def test_workers_that_open_the_first_channels_together_get_one_engine(
    restless_threads: None,
) -> None:
    for _ in range(50):
        reactor = Reactor(0, ControlMailbox())
        bdev = malloc_bdev()
        start = threading.Barrier(4)

        def open_one(
            bdev: MallocBdev = bdev, reactor: Reactor = reactor, start: threading.Barrier = start
        ) -> None:
            start.wait()
            bdev.open_channel(reactor)

        threads = [threading.Thread(target=open_one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reactor.step(1) == 1, "one message: the one engine that was handed over"
        reactor.close()
