"""Coalescing and the timers below it, on a clock that the test turns."""

from __future__ import annotations

import os
import random

from tests.fakes.driver import F_INDIRECT, F_VERSION_1, BlkDriver, EventPort, Kind
from tests.fakes.stepped import TICK, Machine

# Without EVENT_IDX each publication asks for a notification.
PLAIN = 1 << F_VERSION_1 | 1 << F_INDIRECT
INTERVAL = 10_000_000
BASE_US = 1000
IOPS = 1000  # 10 requests in an interval


def calls(port: EventPort) -> int:
    """How often the guest was notified since the last look."""
    try:
        return os.eventfd_read(port.call_fd)
    except BlockingIOError:
        return 0


def one_request(machine: Machine, disk: BlkDriver) -> None:
    disk.queue(Kind.FLUSH)
    disk.ring.publish()
    machine.step(2)  # the notification follows in the next turn
    assert len(disk.collect()) == 1


def coalesced(machine: Machine, base_us: int = BASE_US, iops: int = IOPS) -> tuple[BlkDriver, int]:
    """A queue that has just been found to be busy, and the delay that follows from it."""
    disk = machine.add_queue(4)
    queue = machine.queues[-1]
    machine.settle(queue.set_coalescing(base_us, iops))
    began = machine.now
    calls(machine.ports[-1])
    for _ in range(30):
        one_request(machine, disk)
    assert calls(machine.ports[-1]) == 30, "not before the first look"
    machine.now = began + INTERVAL - TICK
    one_request(machine, disk)  # the look: 30 requests, the threshold is 10
    assert calls(machine.ports[-1]) == 1
    return disk, base_us * 1000 * (30 - 10) // 10


def test_it_is_off_unless_asked_for() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk = machine.add_queue()
        calls(machine.ports[0])
        for _ in range(3):
            for _ in range(200):
                one_request(machine, disk)
            machine.now += INTERVAL
        assert calls(machine.ports[0]) == 600


def test_above_the_threshold_a_call_waits_for_its_delay_and_not_longer() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk, delay = coalesced(machine)
        looked = machine.now
        one_request(machine, disk)
        one_request(machine, disk)
        assert calls(machine.ports[0]) == 0
        machine.now = looked + delay - 2 * TICK
        machine.step()
        assert calls(machine.ports[0]) == 0, "too early"
        machine.step()
        assert calls(machine.ports[0]) == 1, "the timer is the latest"
        machine.step(1000)
        assert calls(machine.ports[0]) == 0, "one call for all that was held"


def test_a_slow_queue_is_never_delayed() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk = machine.add_queue()
        machine.settle(machine.queues[0].set_coalescing(BASE_US, IOPS))
        calls(machine.ports[0])
        for _ in range(50):
            machine.now += INTERVAL // 10
            one_request(machine, disk)
            assert calls(machine.ports[0]) == 1


def test_the_delay_ends_when_the_rate_falls() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk, delay = coalesced(machine)
        machine.now += 3 * INTERVAL
        for _ in range(5):
            one_request(machine, disk)
            assert calls(machine.ports[0]) == 1
        assert delay > 5 * TICK


def test_each_queue_has_a_rate_of_its_own() -> None:
    """Busy and quiet queues side by side, all looked at in the same interval."""
    with Machine(features=PLAIN, poll_us=-1) as machine:
        drivers = [machine.add_queue() for _ in range(4)]
        for queue in machine.queues:
            machine.settle(queue.set_coalescing(BASE_US, IOPS))
        began = machine.now
        for number, disk in enumerate(drivers):
            for _ in range(5 + 20 * (number % 2)):
                one_request(machine, disk)
        machine.now = began + INTERVAL
        for disk in drivers:
            one_request(machine, disk)
        for port in machine.ports:
            calls(port)
        for disk in drivers:
            one_request(machine, disk)
        assert [calls(port) for port in machine.ports] == [1, 0, 1, 0]


def test_stopping_sends_what_is_owed() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk, _delay = coalesced(machine)
        one_request(machine, disk)
        assert calls(machine.ports[0]) == 0
        machine.stop_queue(0)
        assert calls(machine.ports[0]) == 1
        machine.step(1000)
        assert calls(machine.ports[0]) == 0


def test_switching_it_off_sends_what_is_owed() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk, _delay = coalesced(machine)
        one_request(machine, disk)
        machine.settle(machine.queues[0].set_coalescing(0, IOPS))
        assert calls(machine.ports[0]) == 1
        for _ in range(100):
            one_request(machine, disk)
        assert calls(machine.ports[0]) == 100


def test_it_may_be_set_before_the_queue_starts() -> None:
    with Machine(features=PLAIN, poll_us=-1) as machine:
        disk = machine.add_queue()
        again = machine.prepare_queue(disk.ring, base=machine.stop_queue(0))
        assert again.set_coalescing(BASE_US, IOPS).done
        port = machine.ports[0]
        machine.settle(again.start(port.kick_fd, port.call_fd, port.err_fd))
        machine.settle(again.set_enabled(True))
        began = machine.now
        for _ in range(30):
            one_request(machine, disk)
        machine.now = began + INTERVAL
        one_request(machine, disk)
        calls(port)
        one_request(machine, disk)
        assert calls(port) == 0


def test_many_timers_run_in_their_order_whoever_is_cancelled() -> None:
    """Against a plain list: forty queues owe a call each, at forty deadlines."""
    chance = random.Random(1517)
    with Machine(features=PLAIN, poll_us=-1) as machine:
        deadlines: dict[int, int] = {}
        for number in range(40):
            disk, delay = coalesced(machine, base_us=chance.randrange(300_000, 1_000_000))
            looked = machine.now
            one_request(machine, disk)
            deadlines[number] = looked + delay
        for number in chance.sample(range(40), 15):
            machine.stop_queue(number)
            del deadlines[number]
        for port in machine.ports:
            calls(port)
        assert min(deadlines.values()) > machine.now, "this test waits for nothing"
        for number, deadline in sorted(deadlines.items(), key=lambda item: item[1]):
            if deadline - TICK > machine.now:
                machine.now = deadline - TICK - 1
                machine.step()
            machine.now = max(machine.now, deadline - TICK)
            machine.step()
            assert calls(machine.ports[number]) == 1, f"queue {number}"
        assert [calls(port) for port in machine.ports] == [0] * 40
