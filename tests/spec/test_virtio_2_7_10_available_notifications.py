"""virtio 1.3 §2.7.10, available buffer notification suppression, and the sleep of our reactor.

A driver kicks only when asked. Whatever the moment at which it publishes, the request must be
served: the moments are enumerated, turn by turn, from busy to asleep.
"""

from __future__ import annotations

import pytest

from tests.fakes.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, Kind
from tests.fakes.ring import USED_F_NO_NOTIFY
from tests.fakes.stepped import FEATURES, PACKED, Machine

STARTS = [0, 1, 32767, 32768, 65533, 65534, 65535]
EVENT_IDX = 1 << F_VERSION_1 | 1 << F_INDIRECT | 1 << F_EVENT_IDX
FLAGS = 1 << F_VERSION_1 | 1 << F_INDIRECT
UNTIL_ASLEEP = 200
BOTH_RINGS = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])


@pytest.mark.parametrize("features", [EVENT_IDX, FLAGS], ids=["event-idx", "flags"])
@pytest.mark.parametrize("start", STARTS)
def test_a_request_published_at_any_moment_is_served(start: int, features: int) -> None:
    """Between the last work and sleep there are some turns; publish after each of them."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(start=start)
        for turns in range(40):
            disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(UNTIL_ASLEEP)
            disk.collect()
            assert not disk.pending, f"published {turns} turns after work, never served"
            disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(turns)
            disk.collect()


@pytest.mark.parametrize("start", STARTS)
def test_an_idle_queue_asks_for_the_very_next_entry(start: int) -> None:
    with Machine(features=EVENT_IDX) as machine:
        disk = machine.add_queue(start=start)
        for expected in range(start + 1, start + 4):
            disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(UNTIL_ASLEEP)
            assert machine.reactor.stats().queues_armed == 1
            assert disk.ring.avail_event == expected & 0xFFFF
            disk.collect()


def test_with_event_idx_the_used_flags_stay_0() -> None:
    """The device requirement: "The device MUST set flags to 0"."""
    with Machine(features=EVENT_IDX) as machine:
        disk = machine.add_queue()
        for _ in range(10):
            disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(7)
            assert disk.ring.used_flags == 0
            disk.collect()


def test_without_event_idx_an_idle_queue_has_flags_0() -> None:
    with Machine(features=FLAGS) as machine:
        disk = machine.add_queue()
        disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(UNTIL_ASLEEP)
        assert not disk.ring.used_flags & USED_F_NO_NOTIFY


@pytest.mark.parametrize("features", [EVENT_IDX, FLAGS], ids=["event-idx", "flags"])
def test_a_busy_queue_asks_for_no_kick(features: int) -> None:
    """§2.7.10 is there to save kicks: while the queue is polled, none is asked for."""
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(2)
        disk.collect()
        kicks = machine.ports[0].kicks
        for _ in range(20):
            disk.queue(Kind.FLUSH)
            assert not disk.publish()
            machine.step()
            assert len(disk.collect()) == 1
        assert machine.ports[0].kicks == kicks


@BOTH_RINGS
def test_spurious_kicks_do_no_harm(features: int) -> None:
    """The device requirement: "The device MUST handle spurious notifications from the driver"."""
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        for turn in range(20):
            machine.ports[0].kick()
            machine.step(turn)
        disk.write(0, b"\x01" * 512)
        assert machine.queues[0].broken is None


def test_buffers_that_were_there_before_the_start_are_served_without_a_kick() -> None:
    """vhost-user: a front end may start a ring that already holds requests."""
    with Machine() as machine:
        first = machine.add_queue(start=65534)
        ring = first.ring
        assert machine.stop_queue(0) == 65534
        for _ in range(4):
            first.queue(Kind.FLUSH)
        ring.publish()
        again = machine.add_queue(ring=ring)
        machine.step(20)
        assert len(first.collect()) == 4
        assert again.ring is ring


@pytest.mark.parametrize("start", STARTS)
def test_stopping_gives_the_next_avail_index_and_does_not_reset_it(start: int) -> None:
    with Machine() as machine:
        disk = machine.add_queue(start=start)
        for _ in range(3):
            disk.queue(Kind.FLUSH)
        disk.publish()
        disk.wait_all()
        assert machine.stop_queue(0) == (start + 3) & 0xFFFF
        assert machine.stop_queue(0) == (start + 3) & 0xFFFF


@BOTH_RINGS
def test_a_stop_in_the_same_turn_as_the_last_completion_answers_once(features: int) -> None:
    """What completed is published before the stop is answered, and never after."""
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        machine.settle(machine.channel.gate())
        pending = disk.queue(Kind.OUT, 0, b"\x01" * 512)
        disk.publish()
        machine.step(20)
        opened = machine.channel.ungate()
        stopped = machine.queues[0].stop()
        machine.step()
        assert opened.done
        assert stopped.done
        assert stopped.result() == (1 if features == FEATURES else 0x8003_8003)
        disk.collect()
        assert pending.completion is not None
        machine.step(20)


@BOTH_RINGS
def test_a_stopped_queue_touches_nothing(features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        disk.write(0, b"\x01" * 512)
        machine.stop_queue(0)
        machine.ports[0].take_calls()
        ring = disk.any_ring
        used = ring.used if features == FEATURES else ring.desc
        disk.queue(Kind.FLUSH)
        ring.publish()
        whole = disk.memory.read(used, 6 + 8 * ring.size)
        machine.ports[0].kick()
        machine.step(50)
        assert disk.memory.read(used, 6 + 8 * ring.size) == whole
        assert machine.ports[0].take_calls() == 0


@BOTH_RINGS
def test_a_disabled_queue_takes_nothing_until_it_is_enabled(features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        machine.settle(machine.queues[0].set_enabled(False))
        pending = disk.queue(Kind.FLUSH)
        disk.publish()
        machine.ports[0].kick()
        machine.step(50)
        assert not disk.collect()
        machine.settle(machine.queues[0].set_enabled(True))
        machine.step(5)
        disk.collect()
        assert pending.completion is not None


@BOTH_RINGS
def test_one_turn_takes_a_bounded_batch_so_that_others_get_theirs(features: int) -> None:
    with Machine(features=features) as machine:
        greedy, modest = machine.add_queue(512), machine.add_queue()
        for _ in range(256):
            greedy.queue(Kind.FLUSH)
        greedy.publish()
        modest.queue(Kind.FLUSH)
        modest.publish()
        machine.step()
        assert len(modest.collect()) == 1
        assert 0 < len(greedy.collect()) <= 32


@BOTH_RINGS
def test_a_new_memory_table_is_used_from_the_next_request_on(features: int) -> None:
    """The ring itself moves with the table: its user addresses are resolved anew."""
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        disk.write(0, b"\x07" * 4096)
        newer = machine.new_table()
        machine.settle(machine.queues[0].set_table(newer))
        assert disk.read(0, 4096) == b"\x07" * 4096
