"""When a reactor polls on and when it sleeps at once: what it learns from gaps between work.

The clock is the test's. A turn that finds nothing to do puts the queue to rest, if polling
is not thought to pay; that is how the decision shows.
"""

from __future__ import annotations

from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.stepped import Machine

US = 1000
POLL_US = 100
SHORT = 20 * US
LONG = 400 * US  # far longer than a wake-up of 50 us is thought to take


def armed(machine: Machine) -> bool:
    return machine.reactor.stats().queues_armed == 1


def request_after(machine: Machine, disk: BlkDriver, gap: int) -> bool:
    """One request at that distance; was the queue still polled when it came?"""
    came = machine.now + gap
    while machine.now + 10 * US < came:
        machine.step()
    rested = armed(machine)
    machine.now = came - 10 * US
    disk.queue(Kind.FLUSH)
    disk.publish()
    machine.step()
    assert len(disk.collect()) == 1
    return not rested


def polled(machine: Machine, disk: BlkDriver, gap: int, count: int) -> int:
    return sum(request_after(machine, disk, gap) for _ in range(count))


def test_short_gaps_are_polled_through() -> None:
    with Machine(poll_us=POLL_US) as machine:
        disk = machine.add_queue()
        assert polled(machine, disk, SHORT, 200) == 200


def test_after_long_gaps_it_sleeps_at_once() -> None:
    with Machine(poll_us=POLL_US) as machine:
        disk = machine.add_queue()
        polled(machine, disk, LONG, 30)
        asleep_early = 0
        for _ in range(26):
            machine.step(2)
            asleep_early += armed(machine)
            request_after(machine, disk, LONG)
        assert asleep_early == 24, "all but every thirteenth, which is a probe"


def test_polling_comes_back_when_it_pays_again() -> None:
    with Machine(poll_us=POLL_US) as machine:
        disk = machine.add_queue()
        polled(machine, disk, LONG, 100)
        assert polled(machine, disk, SHORT, 26) < 26
        polled(machine, disk, SHORT, 1000)
        assert polled(machine, disk, SHORT, 100) == 100


def test_a_gap_longer_than_a_wake_up_is_not_polled_for() -> None:
    """80 us, a slow disk's: polling through it would cost more than the wake-up."""
    with Machine(poll_us=1000) as machine:
        disk = machine.add_queue()
        polled(machine, disk, 150 * US, 60)
        assert polled(machine, disk, 150 * US, 26) == 0


def test_some_long_gaps_among_short_ones_do_not_end_polling_for_the_short() -> None:
    with Machine(poll_us=POLL_US) as machine:
        disk = machine.add_queue()
        for _ in range(40):
            polled(machine, disk, SHORT, 4)
            request_after(machine, disk, LONG)
        for _ in range(10):
            assert polled(machine, disk, SHORT, 4) == 4
            request_after(machine, disk, LONG)


def test_idle_queues_cost_a_busy_one_no_poll() -> None:
    """256 of them: what is armed is not visited, however long the busy one goes on."""
    with Machine(poll_us=POLL_US) as machine:
        for _ in range(256):
            machine.add_queue(2)
        busy = machine.add_queue()
        for _ in range(50):
            request_after(machine, busy, 10 * US)
        before = [queue.counters().polls for queue in machine.queues]
        for _ in range(500):
            request_after(machine, busy, 10 * US)
        after = [queue.counters() for queue in machine.queues]
        assert [now.polls - then for now, then in zip(after, before, strict=True)][:-1] == [0] * 256
        assert after[-1].busy_polls >= 550
        assert machine.reactor.stats().queues_hot == 1
