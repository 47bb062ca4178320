"""The reactor as a real thread: where it runs, how it sleeps and wakes, who can free it."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import time
from pathlib import Path

import pytest

from drivebay.errors import StateError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import F_VERSION_1, Kind
from tests.fakes.threaded import PATIENCE_S, ThreadedMachine, some_core

FULL = (1 << 64) - 2


def task(tid: int, name: str) -> str:
    return Path(f"/proc/self/task/{tid}/{name}").read_text()


def asleep(machine: ThreadedMachine) -> bool:
    return machine.reactor.stats().sleeping


def test_the_thread_is_pinned_named_and_deaf_to_controls_signals() -> None:
    with ThreadedMachine() as machine:
        machine.until(lambda: machine.reactor.stats().tid != 0, "a thread")
        tid = machine.reactor.stats().tid
        assert os.sched_getaffinity(tid) == {some_core()}
        assert task(tid, "comm").strip() == f"reactor_{some_core()}"
        (blocked,) = [
            int(line.split()[1], 16)
            for line in task(tid, "status").splitlines()
            if line.startswith("SigBlk")
        ]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM):
            assert blocked >> (number - 1) & 1, f"{number.name} may land on the reactor"
        for number in (signal.SIGBUS, signal.SIGSEGV):
            assert not blocked >> (number - 1) & 1, f"{number.name} would kill at once"


def test_a_reactor_starts_once_and_is_not_stepped_then() -> None:
    with ThreadedMachine() as machine:
        machine.step()
        with pytest.raises(StateError, match="runs already"):
            machine.reactor.start()
        with pytest.raises(StateError, match="has a thread"):
            machine.reactor.step(1)


def test_start_stop_join_many_times_leaves_no_thread() -> None:
    before = len(os.listdir("/proc/self/task"))
    control = ControlMailbox()
    for _ in range(20):
        reactor = Reactor(some_core(), control)
        reactor.start()
        stopped = reactor.stop()
        reactor.join()
        control.drain()
        assert stopped.done
        reactor.close()
    # A thread that was joined is still listed until the kernel has taken it away.
    deadline = time.monotonic() + PATIENCE_S
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def test_an_idle_reactor_stands_still_and_says_that_it_sleeps() -> None:
    """No turn, no busy tick and no time on a processor, while idle time goes on."""
    with ThreadedMachine() as machine:
        machine.add_queue().flush()
        machine.until(lambda: asleep(machine), "sleep")
        before = machine.reactor.stats()
        ran = task(before.tid, "schedstat").split()[0]
        time.sleep(0.3)
        after = machine.reactor.stats()
        assert task(before.tid, "schedstat").split()[0] == ran
        assert (after.loops, after.busy_ticks) == (before.loops, before.busy_ticks)
        assert after.idle_ticks > before.idle_ticks
        assert (after.place, after.queues_hot, after.queues_armed) == ("sleep", 0, 1)


def test_a_hundred_idle_queues_sleep_as_one() -> None:
    with ThreadedMachine() as machine:
        drivers = [machine.add_queue(2) for _ in range(100)]
        machine.until(lambda: asleep(machine), "sleep")
        assert machine.reactor.stats().queues_armed == 100
        for driver in drivers:
            driver.flush()
        machine.until(lambda: asleep(machine), "sleep again")


def test_a_message_wakes_a_sleeping_reactor() -> None:
    with ThreadedMachine() as machine:
        for _ in range(200):
            machine.until(lambda: asleep(machine), "sleep")
            machine.settle(machine.channel.gate())
            machine.settle(machine.channel.ungate())


def test_no_kick_is_lost_whenever_the_driver_publishes() -> None:
    """Around the end of the polling window two threads race: the driver looks whether it has
    to kick, the reactor whether something came before it sleeps.
    """
    pause = random.Random(4711)
    with ThreadedMachine(poll_us=30) as machine:
        disk = machine.add_queue()
        for _ in range(3000):
            until = time.perf_counter() + pause.uniform(0, 90e-6)
            while time.perf_counter() < until:
                pass
            disk.flush()
        assert machine.queues[0].counters().requests == 3000
        machine.until(lambda: asleep(machine), "sleep")


def test_without_a_window_it_sleeps_between_any_two_requests() -> None:
    with ThreadedMachine(poll_us=0) as machine:
        disk = machine.add_queue()
        for i in range(500):
            disk.write(i % 64, bytes([i % 256]) * 512)
        assert disk.port is machine.ports[0]
        assert machine.ports[0].kicks > 100
        machine.until(lambda: asleep(machine), "sleep")


def test_a_window_without_end_polls_for_ever() -> None:
    with ThreadedMachine(poll_us=-1) as machine:
        disk = machine.add_queue()
        for _ in range(50):
            time.sleep(0.001)
            disk.flush()
            assert not asleep(machine)
        before = machine.reactor.stats().loops
        machine.until(lambda: machine.reactor.stats().loops > before + 1000, "more turns")
        assert machine.ports[0].kicks <= 1, "only the first may find the queue not yet polled"


def test_a_blocking_call_eventfd_is_freed_and_only_its_queue_is_given_up() -> None:
    """The other holder fills the counter and takes O_NONBLOCK away: our write then waits."""
    with ThreadedMachine() as machine:
        bad, good = machine.add_queue(), machine.add_queue()
        good.flush()
        call = machine.ports[0].call_fd
        os.eventfd_write(call, FULL)
        fcntl.fcntl(call, fcntl.F_SETFL, fcntl.fcntl(call, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        bad.queue(Kind.FLUSH)
        bad.publish()
        machine.until(
            lambda: machine.reactor.stats().place == "notifying a guest", "a blocked write"
        )
        loops = machine.reactor.stats().loops
        waiting = good.queue(Kind.FLUSH)
        good.publish()
        time.sleep(0.05)
        assert machine.reactor.stats().loops == loops, "this test blocked nothing"
        assert machine.reactor.rescue()
        good.wait(waiting)
        machine.until(lambda: machine.broken == [machine.queues[0]], "the queue's end")
        assert "call eventfd" in (machine.queues[0].broken or "")
        assert machine.queues[1].broken is None
        good.flush()
        machine.until(lambda: asleep(machine), "sleep")
        assert not machine.reactor.rescue()


def test_a_reactor_without_a_core_costs_no_queue_and_no_notification() -> None:
    """It stands still in the write as well, but the eventfd has room: here another one, as it
    gets its number while the write waits.
    """
    with ThreadedMachine() as machine:
        disk = machine.add_queue()
        call = machine.ports[0].call_fd
        full, roomy = os.dup(call), os.eventfd(3, os.EFD_NONBLOCK)
        os.eventfd_write(call, FULL)
        flags = fcntl.fcntl(call, fcntl.F_GETFL)
        fcntl.fcntl(call, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        done = disk.queue(Kind.FLUSH)
        disk.publish()
        machine.until(
            lambda: machine.reactor.stats().place == "notifying a guest", "a blocked write"
        )
        os.dup2(roomy, call)
        assert not machine.reactor.rescue()
        assert os.eventfd_read(roomy) == 3, "the guest's notifications were taken from it"
        os.eventfd_read(full)
        disk.wait(done)
        disk.flush()
        assert machine.queues[0].broken is None
        os.close(full)
        os.close(roomy)


def test_a_full_call_eventfd_that_does_not_block_harms_nobody() -> None:
    """The guest is notified already, and more than that cannot be said."""
    with ThreadedMachine() as machine:
        disk = machine.add_queue()
        os.eventfd_write(machine.ports[0].call_fd, FULL)
        done = disk.queue(Kind.FLUSH)
        disk.publish()
        machine.until(lambda: bool(disk.collect()), "a completion")
        assert done.completion is not None
        assert os.eventfd_read(machine.ports[0].call_fd) == FULL
        disk.flush()
        assert machine.queues[0].broken is None


def test_a_reactor_that_never_started_is_stopped_at_once() -> None:
    reactor = Reactor(some_core(), ControlMailbox())
    assert reactor.stop().done
    reactor.start()
    reactor.join()
    reactor.close()


def test_a_held_notification_wakes_a_sleeping_reactor_when_it_is_due() -> None:
    """The deadline bounds the sleep; nothing else would wake it."""
    with ThreadedMachine(features=1 << F_VERSION_1, poll_us=0) as machine:
        disk = machine.add_queue()
        port = machine.ports[0]
        machine.settle(machine.queues[0].set_coalescing(2000, 100))
        began = time.monotonic()
        sent = 0
        while time.monotonic() < began + 0.05:
            disk.queue(Kind.FLUSH)
            disk.publish()
            while not disk.collect():
                pass
            sent += 1
        assert sent > 20, "this test was not busy enough to be coalesced"
        machine.until(lambda: asleep(machine), "sleep")
        machine.until(lambda: bool(select.select([port.call_fd], [], [], 0)[0]), "a call")
        assert machine.queues[0].counters().notifications < sent
