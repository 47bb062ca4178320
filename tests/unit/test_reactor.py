"""The reactor's loop, turn by turn: who is polled, who is armed, who may start it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivebay.errors import HostError, StateError, UsageError
from drivebay.reactor.mailbox import Answer, ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.descriptors import held_fds
from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.stepped import TICK, Machine

WINDOW_TURNS = 50_000 // TICK


def hot_and_armed(machine: Machine) -> tuple[int, int]:
    stats = machine.reactor.stats()
    return stats.queues_hot, stats.queues_armed


def flush_unseen(disk: BlkDriver) -> None:
    """Publish a request without a kick."""
    disk.queue(Kind.FLUSH)
    disk.ring.publish()


def test_a_queue_is_polled_for_its_window_and_then_armed() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        flush_unseen(disk)
        machine.step()
        assert len(disk.collect()) == 1
        for _ in range(WINDOW_TURNS):
            machine.step()
            assert hot_and_armed(machine) == (1, 0)
        machine.step()
        assert hot_and_armed(machine) == (0, 1)
        machine.step(100)
        assert hot_and_armed(machine) == (0, 1)


def test_work_in_the_last_turn_of_the_window_starts_it_anew() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        for _ in range(3):
            flush_unseen(disk)
            machine.step()
            machine.step(WINDOW_TURNS)
            assert hot_and_armed(machine) == (1, 0)


def test_a_kick_makes_an_armed_queue_hot_and_it_is_served_in_the_same_turn() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        machine.step(2 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (0, 1)
        disk.queue(Kind.FLUSH)
        assert disk.publish(), "an armed queue must ask for kicks"
        machine.step()
        assert len(disk.collect()) == 1
        assert hot_and_armed(machine) == (1, 0)


def test_work_without_a_kick_just_before_the_arming_turn_is_served() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        flush_unseen(disk)
        machine.step()
        machine.step(WINDOW_TURNS)
        flush_unseen(disk)
        machine.step()
        assert len(disk.collect()) == 2
        assert hot_and_armed(machine) == (1, 0)


def test_only_the_kicked_queue_becomes_hot() -> None:
    with Machine() as machine:
        drivers = [machine.add_queue() for _ in range(70)]
        machine.step(2 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (0, 70)
        drivers[33].queue(Kind.FLUSH)
        drivers[33].publish()
        machine.step()
        assert hot_and_armed(machine) == (1, 69)
        assert len(drivers[33].collect()) == 1


def test_more_kicks_than_one_look_takes_are_all_seen() -> None:
    with Machine() as machine:
        drivers = [machine.add_queue(2) for _ in range(200)]
        machine.step(2 * WINDOW_TURNS)
        for driver in drivers:
            driver.queue(Kind.FLUSH)
            driver.publish()
        machine.step(5)
        assert [len(driver.collect()) for driver in drivers] == [1] * 200


def test_queues_leave_from_every_place_of_the_list() -> None:
    """First, last and middle one, hot or armed; the others go on."""
    with Machine() as machine:
        drivers = [machine.add_queue(2) for _ in range(6)]
        for index in (0, 5, 2):
            machine.stop_queue(index)
            for other in set(range(6)) - {0, 5, 2}:
                drivers[other].flush()
        assert hot_and_armed(machine) == (3, 0)
        machine.step(2 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (0, 3)
        machine.stop_queue(3)
        assert hot_and_armed(machine) == (0, 2)
        drivers[1].flush()
        drivers[4].flush()


def test_a_window_without_end_never_arms() -> None:
    with Machine(poll_us=-1) as machine:
        machine.add_queue()
        machine.step(1000)
        machine.now += 1 << 62
        machine.step()
        assert hot_and_armed(machine) == (1, 0)


def test_a_window_of_nothing_arms_after_the_first_idle_turn() -> None:
    with Machine(poll_us=0) as machine:
        disk = machine.add_queue()
        machine.step(2)
        assert hot_and_armed(machine) == (0, 1)
        disk.flush()


def test_a_queue_without_a_kick_descriptor_is_polled_for_ever_until_it_has_one() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        port = machine.ports[0]
        machine.settle(machine.queues[0].set_notifiers(-1, port.call_fd, port.err_fd))
        machine.step(10 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (1, 0)
        flush_unseen(disk)
        machine.step()
        assert len(disk.collect()) == 1
        machine.settle(machine.queues[0].set_notifiers(port.kick_fd, port.call_fd, port.err_fd))
        machine.step(2 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (0, 1)
        disk.flush()


def test_a_kick_descriptor_may_be_replaced_while_armed() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        port = machine.ports[0]
        machine.step(2 * WINDOW_TURNS)
        old = port.kick_fd
        port.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        machine.settle(machine.queues[0].set_notifiers(port.kick_fd, port.call_fd, port.err_fd))
        machine.step(2 * WINDOW_TURNS)
        assert hot_and_armed(machine) == (0, 1)
        os.eventfd_write(old, 1)
        machine.step()
        assert hot_and_armed(machine) == (0, 1), "the old descriptor is still watched"
        os.close(old)
        disk.flush()


def test_a_queue_whose_kick_cannot_be_watched_says_so_and_can_be_stopped() -> None:
    """epoll refuses plain files. A descriptor set later must not be watched for it either:
    nobody would take it out of epoll again.
    """
    with Machine() as machine:
        plain = os.memfd_create("no eventfd")
        disk = machine.add_queue()
        machine.stop_queue(0)
        again = machine.prepare_queue(disk.ring)
        assert machine.settle(again.start(plain, -1, -1)) < 0
        assert "kick eventfd cannot be watched" in (again.broken or "")
        assert machine.broken == [again]
        port = machine.ports[0]
        machine.settle(again.set_notifiers(port.kick_fd, port.call_fd, port.err_fd))
        os.eventfd_write(port.kick_fd, 1)
        machine.step(10)
        assert machine.settle(again.stop()) == disk.ring.start
        targets = watched_by(machine.reactor)
        assert port.kick_fd not in targets
        os.close(plain)


def watched_by(reactor: Reactor) -> set[int]:
    """Descriptors in the epoll instances of this process: only one has any while stepped."""
    found = set()
    for info in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = info.read_text().splitlines()
        except OSError:
            continue
        found |= {int(line.split()[1]) for line in lines if line.startswith("tfd:")}
    return found


def test_statistics_say_who_and_what() -> None:
    with Machine() as machine:
        before = machine.reactor.stats()
        assert (before.core, before.tid, before.sleeping) == (0, 0, False)
        machine.step(7)
        assert machine.reactor.stats().loops == before.loops + 7


# ---- who may start it -----------------------------------------------------------------------


def test_a_core_that_is_not_ours_is_refused() -> None:
    absent = max(os.sched_getaffinity(0)) + 1
    reactor = Reactor(absent, ControlMailbox())
    with pytest.raises(HostError, match=f"core {absent}"):
        reactor.start()
    reactor.close()


def test_a_window_must_make_sense() -> None:
    with pytest.raises(UsageError, match="-2") as refused:
        Reactor(0, ControlMailbox(), -2)
    assert refused.value.field == "poll_us"


def test_a_stepped_reactor_has_no_thread() -> None:
    with Machine() as machine, pytest.raises(StateError, match="runs already"):
        machine.reactor.start()


def test_nothing_is_left_of_a_reactor() -> None:
    with Machine() as machine:
        machine.add_queue()
    before = held_fds()
    for _ in range(20):
        with Machine() as machine:
            machine.add_queue().flush()
        assert held_fds() == before


# ---- moving to another reactor --------------------------------------------------------------


def test_a_queue_goes_on_at_the_same_place_on_another_reactor() -> None:
    """With published requests that nobody took, and none kicked for, at each move."""
    with Machine() as machine:
        disk = machine.add_queue()
        port = machine.ports[0]
        other = Reactor(1, machine.control)
        here, there = machine.channel, machine.bdev.open_channel(other)

        def settle(answer: Answer) -> int:
            for _ in range(100):
                machine.step()
                other.step(machine.now)
                machine.control.drain()
            return answer.result()

        settle(there.activate())
        for turn in range(6):
            base = settle(machine.queues[-1].stop())
            pending = [disk.queue(Kind.FLUSH) for _ in range(3)]
            disk.ring.publish()
            machine.channel = there if turn % 2 == 0 else here
            moved = machine.prepare_queue(disk.ring, base=base)
            moved.set_enabled(True)
            settle(moved.start(port.kick_fd, port.call_fd, port.err_fd))
            disk.collect()
            assert all(request.completion is not None for request in pending)
            assert moved.counters().requests == 3
        machine.channel = here
        settle(there.close())
        other.close()
