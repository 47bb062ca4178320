"""I/O that goes through several bdevs in one walk: counted, held and ended at each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from drivebay.bdev.base import Bdev, Channel
from drivebay.bdev.error import ErrorBdev
from drivebay.bdev.file import FileBdev
from drivebay.bdev.passthru import PassthruBdev
from drivebay.bdev.split import SplitBdev
from drivebay.errors import UsageError
from tests.fakes.driver import BlkDriver, Kind, Pending, Status, segment_bytes
from tests.fakes.stepped import Machine, malloc_bdev

MIB = 1 << 20
SECOND = 1_000_000_000
PATTERN = (bytes(range(1, 252)) * (MIB // 251 + 1))[:MIB]


def tower(base: Bdev, height: int = 3) -> list[Bdev]:
    """Parts and passthrus by turns, the lowest first; each part begins 8 blocks further."""
    found = [base]
    for level in range(height):
        below = found[-1]
        if level % 2:
            found.append(PassthruBdev(f"P{level}", None, below))
        else:
            found.append(SplitBdev(f"S{level}", uuid4(), below, 8, below.num_blocks - 8))
    return found


def errors(base: Bdev, height: int) -> list[Bdev]:
    """Error bdevs, each below three passthrus: more levels than an I/O has frames."""
    found = [base]
    for level in range(height):
        found.append(ErrorBdev(f"E{level}", uuid4(), found[-1]))
        for number in range(3):
            found.append(PassthruBdev(f"P{level}{number}", None, found[-1]))
    return found


def channels(machine: Machine, bdevs: list[Bdev]) -> list[Channel]:
    by_bdev = {channel.bdev: channel for channel in [*machine._below, machine.channel]}
    return [by_bdev[bdev] for bdev in bdevs]


@pytest.fixture
def bdevs() -> list[Bdev]:
    return tower(malloc_bdev(size_bytes=4 * MIB))


@pytest.fixture
def machine(bdevs: list[Bdev]) -> Iterator[Machine]:
    with Machine(bdevs[-1]) as made:
        yield made


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue(64)


def writes(machine: Machine, disk: BlkDriver, count: int = 4) -> list[Pending]:
    pending = [
        disk.queue(Kind.OUT, 8 * number, PATTERN[number : number + 4096]) for number in range(count)
    ]
    disk.publish()
    machine.step(5)
    disk.collect()
    return pending


def statuses(disk: BlkDriver, pending: list[Pending]) -> list[int | None]:
    disk.collect()
    return [one.completion and one.completion.status for one in pending]


@pytest.mark.parametrize("level", range(4))
def test_a_gate_anywhere_holds_what_comes_from_above(
    machine: Machine, disk: BlkDriver, bdevs: list[Bdev], level: int
) -> None:
    gated = channels(machine, bdevs)[level]
    machine.settle(gated.gate())
    pending = writes(machine, disk)
    assert statuses(disk, pending) == [None] * 4
    assert [bdev.queue_depth for bdev in bdevs] == [0] * (level + 1) + [4] * (3 - level)
    machine.settle(gated.ungate())
    machine.step(2)
    assert statuses(disk, pending) == [Status.OK] * 4
    for number in range(4):
        assert disk.read(8 * number, 4096) == PATTERN[number : number + 4096]
    for bdev in bdevs:
        assert bdev.queue_depth == 0
        written = bdev.iostat()["write"]
        assert (written.ops, written.bytes, written.errors) == (4, 4 * 4096, 0)


@pytest.mark.parametrize("level", range(4))
def test_an_end_anywhere_is_an_error_for_all_above(
    machine: Machine, disk: BlkDriver, bdevs: list[Bdev], level: int
) -> None:
    held = channels(machine, bdevs)[level]
    machine.settle(held.gate())
    before = writes(machine, disk)
    machine.settle(held.remove())
    machine.step(2)
    assert statuses(disk, before) == [Status.IOERR] * 4
    assert statuses(disk, writes(machine, disk)) == [Status.IOERR] * 4
    for bdev in bdevs[level + 1 :]:
        assert bdev.iostat()["write"].errors == 8
    assert all(bdev.iostat()["write"].ops == 0 and bdev.queue_depth == 0 for bdev in bdevs)


@pytest.mark.parametrize("level", range(1, 4))
def test_a_gate_waits_for_what_went_through(
    machine: Machine, disk: BlkDriver, bdevs: list[Bdev], level: int
) -> None:
    bottom, upper = (channels(machine, bdevs)[number] for number in (0, level))
    machine.settle(bottom.gate())
    pending = writes(machine, disk)
    answer = upper.gate()
    machine.step(5)
    assert not answer.done
    machine.settle(bottom.ungate())
    machine.settle(answer)
    machine.step()
    assert statuses(disk, pending) == [Status.OK] * 4
    machine.settle(upper.ungate())


def test_a_base_that_became_smaller_refuses_what_came_through(
    machine: Machine, disk: BlkDriver, bdevs: list[Bdev]
) -> None:
    bdevs[1].resize(24)
    assert disk.request(Kind.OUT, 8, PATTERN[:4096]).status == Status.OK
    assert disk.request(Kind.OUT, 9, PATTERN[:4096]).status == Status.IOERR
    assert [bdev.iostat()["write"].errors for bdev in bdevs] == [0, 1, 1, 1]
    assert disk.read(8, 4096) == PATTERN[:4096]


def test_limits_at_every_level_of_the_highest_stack_that_fits() -> None:
    """Held again and again on its way, an I/O needs no more frames than it has."""
    bdevs = errors(malloc_bdev(size_bytes=4 * MIB), 3)
    with pytest.raises(UsageError, match="too many others"):
        ErrorBdev("E3", uuid4(), bdevs[-1])
    with Machine(bdevs[-1]) as machine:
        disk = machine.add_queue(64)
        for level, bdev in enumerate(bdevs):  # each holds what the one above let pass
            for answer in bdev.limit((0, (level + 1) * MIB, 0, 0)):
                machine.settle(answer)
        everything = [
            disk.queue(Kind.OUT, 64 * number, PATTERN[number : number + 32768])
            for number in range(8)
        ]
        disk.publish()
        machine.step(5)
        assert None in statuses(disk, everything)
        for _ in range(3000):
            machine.now += SECOND // 10_000
            machine.step()
        assert statuses(disk, everything) == [Status.OK] * 8
        for bdev in bdevs:
            for answer in bdev.limit((0, 0, 0, 0)):
                machine.settle(answer)
            counted = bdev.iostat()["write"]
            assert (counted.ops, counted.bytes, counted.errors) == (8, 8 * 32768, 0)
        for number in range(8):
            assert disk.read(64 * number, 32768) == PATTERN[number : number + 32768]
        assert all(bdev.queue_depth == 0 for bdev in bdevs)


def test_zeroes_that_must_be_stable_are_followed_by_one_flush_of_the_file(
    disk_folder: Path,
) -> None:
    path = disk_folder / "disk.img"
    path.write_bytes(PATTERN)
    bdevs = tower(FileBdev("File0", None, str(path), 512))
    with Machine(bdevs[-1], write_through=True) as machine:
        disk = machine.add_queue(64)
        assert disk.request(Kind.WRITE_ZEROES, data=segment_bytes(8, 8)).status == Status.OK
        assert [bdev.iostat()["write_zeroes"].ops for bdev in bdevs] == [1] * 4
        assert [bdev.iostat()["flush"].ops for bdev in bdevs] == [1, 0, 0, 0]
        assert [bdev.iostat()["flush"].bytes for bdev in bdevs] == [0] * 4
        begin = (8 + 16) * 512
        assert path.read_bytes() == PATTERN[:begin] + bytes(4096) + PATTERN[begin + 4096 :]
        assert all(bdev.queue_depth == 0 for bdev in bdevs)


def test_there_is_an_end_to_stacks() -> None:
    assert tower(malloc_bdev(), 64)[-1].bases
    with pytest.raises(UsageError, match="too many others"):
        tower(malloc_bdev(), 65)
