"""The delay bdev on a clock that the test turns: a turn of the reactor is 10 µs."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from drivebay.bdev.delay import LATENCIES, MOST_US, DelayBdev
from drivebay.errors import UsageError
from tests.fakes.driver import BlkDriver, Kind, Pending, Status
from tests.fakes.stepped import Machine, malloc_bdev

TURN_US = 10
LATE_TURNS = 4  # from submission to the base's answer, and from the deadline to the guest


def delay_bdev(**latencies: int) -> DelayBdev:
    return DelayBdev("D0", uuid4(), malloc_bdev(), {**dict.fromkeys(LATENCIES, 0), **latencies})


@pytest.fixture
def bdev() -> DelayBdev:
    return delay_bdev(avg_read=1000, p99_read=1000, avg_write=3000, p99_write=3000)


@pytest.fixture
def machine(bdev: DelayBdev) -> Iterator[Machine]:
    with Machine(bdev) as made:
        yield made


def start(disk: BlkDriver, kind: Kind, sector: int = 0) -> Pending:
    data = b"w" * 512 if kind == Kind.OUT else b""
    pending = disk.queue(kind, sector, data, room=512 * (kind == Kind.IN))
    disk.publish()
    return pending


def turns_of(machine: Machine, disk: BlkDriver, pending: Pending, most: int = 5000) -> int:
    """How many turns it takes until that one is complete."""
    for turn in range(most):
        disk.collect()
        if pending.completion is not None:
            return turn
        machine.step()
    raise AssertionError(f"not within {most} turns")


def pass_the_slow_read(machine: Machine, disk: BlkDriver, bdev: DelayBdev) -> None:
    """Read until the next ten are none of the slow ones."""
    bdev.set_latency("avg_read", 0)
    number = 0
    while turns_of(machine, disk, start(disk, Kind.IN)) < 50 or number % 100 > 89:
        number += 1
    bdev.set_latency("avg_read", 1000)


@pytest.mark.parametrize(("kind", "latency_us"), [(Kind.IN, 1000), (Kind.OUT, 3000)])
def test_it_answers_after_its_latency(machine: Machine, kind: Kind, latency_us: int) -> None:
    disk = machine.add_queue()
    took = turns_of(machine, disk, start(disk, kind))
    assert latency_us // TURN_US <= took <= latency_us // TURN_US + LATE_TURNS


@pytest.mark.parametrize("kind", [Kind.FLUSH, Kind.DISCARD, Kind.WRITE_ZEROES])
def test_other_requests_are_not_late(machine: Machine, kind: Kind) -> None:
    disk = machine.add_queue()
    data = bytes(8) + b"\1\0\0\0" + bytes(4) if kind != Kind.FLUSH else b""
    pending = disk.queue(kind, 0, data)
    disk.publish()
    assert turns_of(machine, disk, pending) <= LATE_TURNS


def test_without_latency_it_is_not_late() -> None:
    with Machine(delay_bdev()) as machine:
        disk = machine.add_queue()
        assert turns_of(machine, disk, start(disk, Kind.IN)) <= LATE_TURNS


def test_exactly_one_of_a_hundred_is_slow() -> None:
    with Machine(delay_bdev(avg_read=20, p99_read=500, p99_write=500)) as machine:
        disk = machine.add_queue()
        for kind in (Kind.IN, Kind.OUT):
            took = [turns_of(machine, disk, start(disk, kind)) for _ in range(300)]
            for hundred in range(3):
                slow = [t for t in took[100 * hundred : 100 * hundred + 100] if t >= 50]
                assert len(slow) == 1


def test_two_queues_with_different_latencies_do_not_hold_each_other_up(machine: Machine) -> None:
    writer, reader = machine.add_queue(), machine.add_queue()
    written = [start(writer, Kind.OUT, i) for i in range(4)]
    machine.step(5)
    for i in range(2):
        assert turns_of(machine, reader, start(reader, Kind.IN, i)) <= 100 + LATE_TURNS
    assert not writer.collect()
    for pending in written:
        assert turns_of(machine, writer, pending) <= 100


def test_a_lower_latency_loses_nothing_and_keeps_the_order(
    machine: Machine, bdev: DelayBdev
) -> None:
    disk = machine.add_queue(64)
    pass_the_slow_read(machine, disk, bdev)
    old = [start(disk, Kind.IN, i) for i in range(4)]
    machine.step(10)
    bdev.set_latency("avg_read", 0)
    new = [start(disk, Kind.IN, 4 + i) for i in range(4)]
    machine.step(80)
    assert not disk.collect()  # the newcomers wait behind those who came before
    machine.step(30)
    assert disk.collect() == [*old, *new]
    assert turns_of(machine, disk, start(disk, Kind.IN)) <= LATE_TURNS


def test_a_higher_latency_is_for_newcomers(machine: Machine, bdev: DelayBdev) -> None:
    disk = machine.add_queue()
    pass_the_slow_read(machine, disk, bdev)
    old = start(disk, Kind.IN, 0)
    machine.step(10)
    bdev.set_latency("avg_read", 5000)
    new = start(disk, Kind.IN, 1)
    assert turns_of(machine, disk, old) <= 100
    assert turns_of(machine, disk, new) >= 390


def test_removal_ends_what_waits_with_its_true_answer(machine: Machine, bdev: DelayBdev) -> None:
    disk = machine.add_queue()
    waiting = [start(disk, kind, i) for i, kind in enumerate([Kind.IN, Kind.OUT, Kind.IN])]
    machine.step(5)
    answer = machine.channel.remove()
    machine.step(5)
    assert answer.done
    assert {pending.head for pending in disk.collect()} == {pending.head for pending in waiting}
    assert all(pending.completion and pending.completion.status == 0 for pending in waiting)
    late = start(disk, Kind.IN)
    assert turns_of(machine, disk, late) <= LATE_TURNS
    assert late.completion is not None
    assert late.completion.status == Status.IOERR


def test_closing_ends_what_waits(machine: Machine) -> None:
    disk = machine.add_queue()
    waiting = start(disk, Kind.OUT)
    machine.step(5)
    answer = machine.channel.close()
    machine.step(5)
    assert answer.done
    assert disk.collect() == [waiting]


def test_quiescing_waits_for_those_that_wait(machine: Machine) -> None:
    disk = machine.add_queue()
    start(disk, Kind.IN)
    machine.step(5)
    answer = machine.channel.gate()
    machine.step(50)
    assert not answer.done
    machine.step(60)
    assert answer.done
    machine.settle(machine.channel.ungate())


def test_a_latency_of_more_than_a_day_is_refused(bdev: DelayBdev) -> None:
    with pytest.raises(UsageError, match="of a day"):
        bdev.set_latency("avg_read", MOST_US + 1)
    assert bdev.latencies["avg_read"] == 1000
