"""Limits of a bdev on a clock that the test turns: exact, fair, changed while they bite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from drivebay.bdev.null import NullBdev
from drivebay.bdev.passthru import PassthruBdev
from tests.fakes.driver import BlkDriver, Kind, Pending, Status, segment_bytes
from tests.fakes.stepped import Machine, malloc_bdev

KIB, MIB = 1 << 10, 1 << 20
SECOND = 1_000_000_000
STEP = 100_000
NO_LIMIT = (0, 0, 0, 0)
WARM_UP = SECOND // 50


class Load:
    """A guest that keeps so many requests of one size in flight on a queue of its own."""

    def __init__(
        self, machine: Machine, depth: int, size: int = 512, kinds: tuple[Kind, ...] = (Kind.IN,)
    ) -> None:
        self.disk: BlkDriver = machine.add_queue(4 << (depth - 1).bit_length())
        self._depth = depth
        self._size = size
        self._kinds = kinds
        self._sent = 0
        self._open: dict[int, Kind] = {}  # by head
        self.done = dict.fromkeys(kinds, 0)

    def fill(self) -> None:
        while len(self._open) < self._depth:
            kind = self._kinds[self._sent % len(self._kinds)]
            if kind == Kind.IN:
                pending = self.disk.queue(kind, 0, room=self._size)
            else:
                pending = self.disk.queue(kind, 0, bytes(self._size))
            self._open[pending.head] = kind
            self._sent += 1
        self.disk.publish()

    def collect(self) -> None:
        for pending in self.disk.collect():
            assert pending.completion is not None
            assert pending.completion.status == Status.OK
            self.done[self._open.pop(pending.head)] += 1

    @property
    def total(self) -> int:
        return sum(self.done.values())


def run(loads: dict[Machine, list[Load]], ticks: int, step: int = STEP) -> None:
    """Let the machines live on one clock."""
    machines = list(loads)
    now = max(machine.now for machine in machines)
    for _ in range(ticks // step):
        now += step
        for machine in machines:
            for load in loads[machine]:
                load.fill()
            machine.now = now - 10_000
            machine.step()
            for load in loads[machine]:
                load.collect()


def measure(machine: Machine, *loads: Load, ticks: int = SECOND, step: int = STEP) -> list[int]:
    """Requests that each completed in a second, once what was saved up is used."""
    run({machine: list(loads)}, WARM_UP, step)
    before = [load.total for load in loads]
    run({machine: list(loads)}, ticks, step)
    return [load.total - done for load, done in zip(loads, before, strict=True)]


def limit(machine: Machine, rates: tuple[int, int, int, int], bdev: Any = None) -> None:
    for answer in (bdev or machine.bdev).limit(rates):
        machine.settle(answer)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(malloc_bdev(size_bytes=4 * MIB)) as made:
        yield made


@pytest.mark.parametrize("depth", [1, 3, 32, 256])
def test_requests_a_second_are_exact_at_any_depth(machine: Machine, depth: int) -> None:
    limit(machine, (1000, 0, 0, 0))
    (done,) = measure(machine, Load(machine, depth))
    assert abs(done - 1000) <= 20


@pytest.mark.parametrize(
    ("size", "mebibytes", "expected"),
    [(512, 1, 2048), (4 * KIB, 4, 1024), (64 * KIB, 40, 640), (MIB, 100, 100)],
)
@pytest.mark.parametrize("depth", [1, 3])
def test_bytes_a_second_are_exact_at_any_size(
    machine: Machine, size: int, mebibytes: int, expected: int, depth: int
) -> None:
    limit(machine, (0, mebibytes * MIB, 0, 0))
    (done,) = measure(machine, Load(machine, depth, size))
    assert abs(done - expected) <= expected * 0.02


def test_a_request_that_costs_seconds_goes_and_is_paid_for(machine: Machine) -> None:
    limit(machine, (0, MIB, 0, 0))
    load = Load(machine, 1, 4 * MIB // 2)
    run({machine: [load]}, SECOND // 10)
    assert load.total == 1
    run({machine: [load]}, 7 * SECOND, step=SECOND // 1000)
    assert load.total == 4


def test_limits_of_several_kinds_hold_together(machine: Machine) -> None:
    limit(machine, (2000, 0, 0, MIB // 4))
    writes, reads = Load(machine, 32, kinds=(Kind.OUT,)), Load(machine, 8)
    written, read = measure(machine, writes, reads)
    assert abs(written - 512) <= 11
    assert abs(read + written - 2000) <= 40


def test_reads_do_not_wait_for_the_limit_of_writes(machine: Machine) -> None:
    limit(machine, (0, 0, 0, MIB // 4))
    load = Load(machine, 16, kinds=(Kind.OUT,))
    run({machine: [load]}, WARM_UP)
    disk = machine.add_queue()
    for _ in range(20):
        disk.read(0, 512)
    assert machine.bdev.iostat()["read"].max_latency_ticks == 0
    assert load.total < 20


def test_only_reads_and_writes_are_limited(machine: Machine) -> None:
    limit(machine, (1000, 0, 0, 0))
    load = Load(machine, 64)
    run({machine: [load]}, SECOND // 100)
    disk = machine.add_queue()
    assert disk.request(Kind.FLUSH).status == Status.OK
    assert disk.request(Kind.WRITE_ZEROES, data=segment_bytes(0, 8)).status == Status.OK


def test_queues_share_a_limit_whatever_their_depths(machine: Machine) -> None:
    limit(machine, (3000, 0, 0, 0))
    loads = [Load(machine, depth) for depth in (1, 8, 100)]
    shares = measure(machine, *loads, ticks=SECOND // 2)
    assert abs(sum(shares) - 1500) <= 30
    assert min(shares) >= 450, shares


def test_a_queue_of_large_requests_has_no_more_bytes_than_one_of_small_ones(
    machine: Machine,
) -> None:
    limit(machine, (0, 20 * MIB, 0, 0))
    large, small = Load(machine, 4, 512 * KIB), Load(machine, 64, 16 * KIB)
    done = measure(machine, large, small)
    moved = [done[0] * 512, done[1] * 16]
    assert abs(sum(moved) - 20 * 1024) <= 600
    assert min(moved) >= 0.45 * sum(moved), moved


@contextmanager
def two_reactors(rates: tuple[int, int, int, int]) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with one limited disk; the limit ends before they do."""
    bdev = malloc_bdev(size_bytes=4 * MIB)

    def set_limits(wanted: tuple[int, int, int, int]) -> None:
        answers = bdev.limit(wanted)
        while not all(answer.done for answer in answers):
            one.step()
            other.step()

    with Machine(bdev) as one, Machine(bdev, core=1) as other:
        one.now = other.now = max(one.now, other.now)
        set_limits(rates)
        yield one, other
        one.now = other.now = max(one.now, other.now)
        set_limits(NO_LIMIT)


@pytest.mark.parametrize("depths", [(32, 32), (1, 64), (2, 100)])
def test_reactors_share_one_budget(depths: tuple[int, int]) -> None:
    with two_reactors((2000, 0, 0, 0)) as (one, other):
        loads = {one: [Load(one, depths[0])], other: [Load(other, depths[1])]}
        run(loads, WARM_UP, STEP // 2)
        before = [load.total for (load,) in loads.values()]
        run(loads, SECOND // 2, STEP // 2)
        shares = [load.total - b for (load,), b in zip(loads.values(), before, strict=True)]
        assert abs(sum(shares) - 1000) <= 20
        assert min(shares) >= 400, shares


def test_a_reactor_that_stands_still_costs_the_other_nothing() -> None:
    with two_reactors((1000, 0, 0, 0)) as (one, other):
        stuck, load = Load(one, 32), Load(other, 32)
        run({one: [stuck], other: [load]}, SECOND // 10)
        before = load.total
        run({other: [load]}, SECOND)
        assert abs(load.total - before - 1000) <= 20


def test_limits_change_while_they_bite(machine: Machine) -> None:
    limit(machine, (1000, 0, 0, 0))
    load = Load(machine, 32)
    assert abs(measure(machine, load, ticks=SECOND // 4)[0] - 250) <= 5
    limit(machine, (4000, 0, 0, 0))
    assert abs(measure(machine, load, ticks=SECOND // 4)[0] - 1000) <= 20
    limit(machine, (4000, MIB // 2, 0, 0))
    assert abs(measure(machine, load, ticks=SECOND // 4)[0] - 256) <= 6
    limit(machine, NO_LIMIT)
    assert measure(machine, load, ticks=STEP * 100)[0] == 32 * 100


def test_what_an_old_limit_left_unpaid_is_forgotten(machine: Machine) -> None:
    limit(machine, (0, MIB, 0, 0))
    load = Load(machine, 2, 2 * MIB)
    run({machine: [load]}, SECOND // 100)
    assert load.total == 1
    limit(machine, (0, 1000 * MIB, 0, 0))
    run({machine: [load]}, SECOND // 100)
    assert load.total > 1


def held_reads(machine: Machine, count: int = 8) -> tuple[BlkDriver, list[Pending]]:
    """Reads that wait for a limit."""
    limit(machine, (0, MIB, 0, 0))
    disk = machine.add_queue(32)
    disk.request(Kind.IN, 0, room=MIB)
    pending = [disk.queue(Kind.IN, 0, room=512) for _ in range(count)]
    disk.publish()
    machine.step(5)
    disk.collect()
    assert all(read.completion is None for read in pending)
    assert machine.bdev.queue_depth == count
    return disk, pending


def statuses(disk: BlkDriver, pending: list[Pending]) -> list[int | None]:
    disk.collect()
    return [read.completion and read.completion.status for read in pending]


def test_what_waits_ends_with_an_error_when_the_bdev_is_removed(machine: Machine) -> None:
    disk, pending = held_reads(machine)
    machine.settle(machine.channel.remove())
    machine.step()
    assert statuses(disk, pending) == [Status.IOERR] * 8
    assert disk.request(Kind.IN, 0, room=512).status == Status.IOERR
    assert machine.bdev.queue_depth == 0


def test_what_waits_goes_on_when_the_limit_is_cleared(machine: Machine) -> None:
    disk, pending = held_reads(machine)
    limit(machine, NO_LIMIT)
    machine.step()
    assert statuses(disk, pending) == [Status.OK] * 8


def test_a_quiesce_does_not_wait_for_a_limit(machine: Machine) -> None:
    disk, pending = held_reads(machine)
    machine.settle(machine.channel.gate())
    machine.now += 2 * SECOND
    machine.step(10)
    assert statuses(disk, pending) == [None] * 8
    machine.settle(machine.channel.ungate())
    machine.now += SECOND
    machine.step(10)
    assert statuses(disk, pending) == [Status.OK] * 8


def test_a_limit_that_is_cleared_during_a_quiesce_lets_go_afterwards(machine: Machine) -> None:
    disk, pending = held_reads(machine)
    machine.settle(machine.channel.gate())
    limit(machine, NO_LIMIT)
    machine.step(5)
    assert statuses(disk, pending) == [None] * 8
    machine.settle(machine.channel.ungate())
    machine.step()
    assert statuses(disk, pending) == [Status.OK] * 8


def test_what_waits_is_checked_again_when_its_turn_comes() -> None:
    with Machine(NullBdev("Null0", None, 512, 4096)) as machine:
        limit(machine, (0, MIB, 0, 0))
        disk = machine.add_queue(32)
        disk.request(Kind.IN, 0, room=MIB)
        pending = [disk.queue(Kind.IN, sector, room=512) for sector in (0, 4095)]
        disk.publish()
        machine.step(5)
        machine.bdev.resize(2048)
        limit(machine, NO_LIMIT)
        machine.step()
        assert statuses(disk, pending) == [Status.OK, Status.IOERR]


def test_the_wait_is_in_the_latency_of_the_limited_bdev_alone() -> None:
    base = malloc_bdev(size_bytes=4 * MIB)
    with Machine(PassthruBdev("P0", None, base)) as machine:
        limit(machine, (1000, 0, 0, 0))
        measure(machine, Load(machine, 8), ticks=SECOND // 4)
        read = machine.bdev.iostat()["read"]
        assert 7_000_000 < read.latency_ticks / read.ops < 8_500_000
        assert base.iostat()["read"].max_latency_ticks == 0


def test_a_limited_base_slows_what_stands_on_it() -> None:
    base = malloc_bdev(size_bytes=4 * MIB)
    with Machine(PassthruBdev("P0", None, base)) as machine:
        limit(machine, (1000, 0, 0, 0), base)
        (done,) = measure(machine, Load(machine, 8), ticks=SECOND // 4)
        assert abs(done - 250) <= 5


def test_a_channel_that_opens_later_is_limited_too() -> None:
    bdev = malloc_bdev(size_bytes=4 * MIB)
    bdev.limit((1000, 0, 0, 0))
    with Machine(bdev) as machine:
        assert abs(measure(machine, Load(machine, 32), ticks=SECOND // 4)[0] - 250) <= 5
