"""Channels while I/O is in flight: gate, ungate, remove, close; and what iostat counts.

The I/O in flight is a disk of 64 MiB being cleared: it goes on a piece in each turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivebay.bdev.base import OpStats
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.null import NullBdev
from drivebay.errors import UsageError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import BlkDriver, Kind, Pending, Status, segment_bytes
from tests.fakes.stepped import TICK, Machine, malloc_bdev

MIB = 1 << 20
PIECE = 2 * MIB
PIECES = 32
DISK_SECTORS = PIECES * PIECE // 512
ALL = segment_bytes(0, DISK_SECTORS)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(malloc_bdev(size_bytes=PIECES * PIECE)) as made:
        yield made


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue()


def start_clearing(machine: Machine, disk: BlkDriver) -> Pending:
    """In flight from now on, for about as many turns as there are pieces."""
    pending = disk.queue(Kind.WRITE_ZEROES, data=ALL)
    disk.publish()
    machine.step(3)
    disk.collect()
    assert pending.completion is None
    return pending


def queue_read(machine: Machine, disk: BlkDriver) -> Pending:
    pending = disk.queue(Kind.IN, 0, room=512)
    disk.publish()
    machine.step(2)
    disk.collect()
    return pending


def status_of(pending: Pending) -> int | None:
    return None if pending.completion is None else pending.completion.status


def test_a_gate_is_answered_when_nothing_is_in_flight(machine: Machine, disk: BlkDriver) -> None:
    clearing = start_clearing(machine, disk)
    gated = machine.channel.gate()
    held = queue_read(machine, disk)
    assert not gated.done
    assert status_of(held) is None
    while not gated.done:
        assert status_of(clearing) is None, "drained, but the gate was not answered"
        machine.step()
        disk.collect()
    machine.step()
    disk.collect()
    assert status_of(clearing) == Status.OK
    assert status_of(held) is None
    machine.step(50)
    disk.collect()
    assert status_of(held) is None
    assert machine.queues[0].counters().inflight == 1
    machine.settle(machine.channel.ungate())
    assert disk.wait(held).status == Status.OK


def test_held_io_goes_on_in_its_order(machine: Machine) -> None:
    disk = machine.add_queue(32)
    machine.settle(machine.channel.gate())
    for fill in range(5):
        disk.queue(Kind.OUT, 7, bytes([fill]) * 512)
    read = disk.queue(Kind.IN, 7, room=512)
    disk.publish()
    machine.step(5)
    machine.settle(machine.channel.ungate())
    assert disk.wait(read).data == b"\x04" * 512


def test_a_gate_that_is_opened_early_is_still_answered(machine: Machine, disk: BlkDriver) -> None:
    clearing = start_clearing(machine, disk)
    gated = machine.channel.gate()
    held = queue_read(machine, disk)
    machine.settle(machine.channel.ungate())
    machine.step()
    disk.collect()
    assert status_of(held) == Status.OK
    assert not gated.done
    disk.wait(clearing)
    machine.settle(gated)


def test_whoever_waits_for_the_same_end_is_answered(machine: Machine, disk: BlkDriver) -> None:
    """A hot remove while a quiesce is under way: neither may wait for ever."""
    clearing = start_clearing(machine, disk)
    answers = [
        machine.channel.gate(),
        machine.channel.gate(),
        machine.channel.remove(),
        machine.channel.close(),
    ]
    machine.step(2)
    assert not any(answer.done for answer in answers)
    disk.wait(clearing)
    machine.step(2)
    assert all(answer.done for answer in answers)


def test_remove_fails_what_is_held_and_what_comes_and_drains_the_rest(
    machine: Machine, disk: BlkDriver
) -> None:
    clearing = start_clearing(machine, disk)
    machine.channel.gate()
    held = queue_read(machine, disk)
    removed = machine.channel.remove()
    machine.step(2)
    disk.collect()
    assert status_of(held) == Status.IOERR
    assert not removed.done
    for kind in (Kind.IN, Kind.FLUSH):
        assert disk.request(kind, 0, room=512 * (kind == Kind.IN)).status == Status.IOERR
    assert disk.request(Kind.OUT, 0, b"x" * 512).status == Status.IOERR
    assert status_of(clearing) is None
    machine.settle(removed)
    assert disk.wait(clearing).status == Status.OK
    machine.settle(machine.channel.gate())
    assert disk.request(Kind.IN, 0, room=512).status == Status.IOERR, "a gate revived it"


def test_close_is_answered_when_the_reactor_has_let_go(machine: Machine, disk: BlkDriver) -> None:
    clearing = start_clearing(machine, disk)
    closed = machine.channel.close()
    machine.step(2)
    assert not closed.done
    assert disk.wait(clearing).status == Status.OK
    machine.settle(closed)


def test_a_channel_that_was_never_brought_to_life_closes_at_once() -> None:
    bdev = malloc_bdev()
    reactor = Reactor(0, ControlMailbox())
    channel = bdev.open_channel(reactor)
    assert channel.gate().done
    assert channel.close().done
    reactor.close()


def test_a_queue_that_stops_waits_for_its_io(machine: Machine, disk: BlkDriver) -> None:
    clearing = start_clearing(machine, disk)
    stopped = machine.queues[0].stop()
    ignored = queue_read(machine, disk)
    assert not stopped.done
    assert machine.settle(stopped) == 1
    disk.collect()
    assert status_of(clearing) == Status.OK
    assert status_of(ignored) is None


def test_old_memory_is_let_go_when_its_last_request_is_over(
    machine: Machine, disk: BlkDriver
) -> None:
    clearing = start_clearing(machine, disk)
    switched = machine.queues[0].set_table(machine.new_table())
    younger = disk.queue(Kind.WRITE_ZEROES, data=ALL)
    disk.publish()
    machine.step(5)
    assert not switched.done
    disk.wait(clearing)
    machine.step()
    assert switched.done
    assert status_of(younger) is None, "a request of the new table held up the answer"
    disk.wait(younger)


def test_memory_that_changes_again_before_the_first_change_is_over(
    machine: Machine, disk: BlkDriver
) -> None:
    """Each change has an answer of its own; a lost one would be waited for, for ever."""
    clearing = start_clearing(machine, disk)
    first = machine.queues[0].set_table(machine.new_table())
    second = machine.queues[0].set_table(machine.new_table())
    machine.step(5)
    assert not first.done
    assert not second.done
    disk.wait(clearing)
    machine.step()
    assert first.done
    assert second.done


def test_the_memory_that_a_queue_has_already_is_no_switch(
    machine: Machine, disk: BlkDriver
) -> None:
    """Nothing is old then, and the requests in flight must not be counted as if."""
    clearing = start_clearing(machine, disk)
    machine.settle(machine.queues[0].set_table(machine.table))
    assert status_of(clearing) is None
    disk.wait(clearing)
    machine.settle(machine.queues[0].set_table(machine.new_table()))


# ---- what is counted ------------------------------------------------------------------------


def test_operations_and_bytes_are_counted_by_kind(machine: Machine, disk: BlkDriver) -> None:
    disk.write(0, b"x" * 4096)
    disk.write(8, b"x" * 512)
    disk.read(0, 1024)
    disk.flush()
    disk.discard(0, 16)
    disk.write_zeroes(0, 8)
    found = {name: (s.ops, s.bytes, s.errors) for name, s in machine.channel.stats().items()}
    assert found == {
        "read": (1, 1024, 0),
        "write": (2, 4608, 0),
        "flush": (1, 0, 0),
        "unmap": (1, 8192, 0),
        "write_zeroes": (1, 4096, 0),
    }


def test_errors_are_counted_apart(machine: Machine, disk: BlkDriver) -> None:
    assert disk.request(Kind.IN, DISK_SECTORS, room=512).status == Status.IOERR
    assert machine.channel.stats()["read"] == OpStats(0, 0, 1, 0, 0, 0)


def test_latency_is_the_time_from_the_turn_that_took_it_to_the_one_that_completed_it(
    machine: Machine, disk: BlkDriver
) -> None:
    """The turn that takes a request clears its first piece already."""
    disk.request(Kind.WRITE_ZEROES, data=ALL)
    disk.request(Kind.WRITE_ZEROES, data=segment_bytes(0, 3 * PIECE // 512))
    long, short = (PIECES - 1) * TICK, 2 * TICK
    found = machine.channel.stats()["write_zeroes"]
    assert found == OpStats(2, (PIECES + 3) * PIECE, 0, long + short, long, short)


def test_a_disks_figures_outlive_its_channels(machine: Machine, disk: BlkDriver) -> None:
    disk.write(0, b"x" * 512)
    machine.settle(machine.channel.close())
    assert machine.bdev.iostat()["write"].bytes == 512
    machine.channel = machine.bdev.open_channel(machine.reactor)
    machine.settle(machine.channel.activate())
    assert machine.bdev.iostat()["write"].bytes == 512


def test_figures_of_several_reactors_are_summed(machine: Machine, disk: BlkDriver) -> None:
    with Machine(machine.bdev) as other:
        other.add_queue().write(0, b"x" * 1024)
        disk.write(0, b"x" * 512)
        assert machine.bdev.iostat()["write"].bytes == 1536
        assert machine.bdev.iostat()["write"].ops == 2
    assert machine.bdev.iostat()["write"].bytes == 1536


RESETS = {
    "all": OpStats(0, 0, 0, 0, 0, 0),
    "maxmin": OpStats(2, (PIECES + 3) * PIECE, 1, (PIECES + 1) * TICK, 0, 0),
    "error": OpStats(
        2, (PIECES + 3) * PIECE, 0, (PIECES + 1) * TICK, (PIECES - 1) * TICK, 2 * TICK
    ),
}


@pytest.mark.parametrize("mode", RESETS)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_reset_forgets_what_its_mode_says(
    machine: Machine, disk: BlkDriver, mode: str, closed: bool
) -> None:
    disk.request(Kind.WRITE_ZEROES, data=ALL)
    disk.request(Kind.WRITE_ZEROES, data=segment_bytes(0, 3 * PIECE // 512))
    disk.request(Kind.WRITE_ZEROES, data=segment_bytes(DISK_SECTORS, 1))
    if closed:
        machine.settle(machine.channel.close())
    machine.bdev.reset_iostat(mode)
    assert machine.bdev.iostat()["write_zeroes"] == RESETS[mode]


# ---- what every bdev refuses ----------------------------------------------------------------

BAD_NAMES = ["", "a\0b", "x" * 256, "\u00e4" * 128, "two\nlines", "\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_must_be_printable_and_fit(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        NullBdev(name, None, 512, 8)
    assert refused.value.field == "name"
    str(refused.value).encode()


def test_a_name_may_be_as_long_as_allowed_and_in_any_script() -> None:
    assert NullBdev("x" * 255, None, 512, 8).name == "x" * 255
    assert NullBdev("Festplatte \u00e4\u6f22", None, 512, 8).num_blocks == 8


@pytest.mark.parametrize("block_size", [0, -512, 1, 256, 511, 513, 768, 1 << 17, 1 << 30])
@pytest.mark.parametrize("kind", [MallocBdev, NullBdev])
def test_a_block_size_must_be_a_sensible_power_of_two(
    kind: type[MallocBdev] | type[NullBdev], block_size: int
) -> None:
    with pytest.raises(UsageError, match=f"block size {block_size} ") as refused:
        kind("d", None, block_size, 8)
    assert refused.value.field == "block_size"


@pytest.mark.parametrize("blocks", [0, -1, 1 << 54, 1 << 64, 1 << 200])
def test_a_number_of_blocks_must_fit(blocks: int) -> None:
    with pytest.raises(UsageError) as refused:
        NullBdev("d", None, 512, blocks)
    assert refused.value.field == "num_blocks"
    bdev = NullBdev("d", None, 512, 8)
    with pytest.raises(UsageError):
        bdev.resize(blocks)
    assert bdev.num_blocks == 8


def test_the_largest_disk_is_reachable_to_its_end() -> None:
    """Offsets are summed in 64 bits."""
    blocks = (1 << 54) - 1
    with Machine(NullBdev("d", None, 512, blocks)) as machine:
        disk = machine.add_queue()
        assert disk.request(Kind.IN, blocks - 1, room=512).status == Status.OK
        assert disk.request(Kind.IN, blocks, room=512).status == Status.IOERR
        assert disk.request(Kind.IN, blocks - 1, room=1024).status == Status.IOERR
