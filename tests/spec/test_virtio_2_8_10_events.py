"""virtio 1.3 §2.8.10, event suppression in packed rings: who is told when, in both directions.

The driver's area says when the device notifies, the device's area when the driver kicks: always,
never, or (with EVENT_IDX) when one named descriptor is passed. A batch is shown in one turn of
the reactor, and the notification follows in the next.
"""

from __future__ import annotations

import pytest

from tests.fakes.driver import F_EVENT_IDX, Framing, Kind
from tests.fakes.packed_ring import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE
from tests.fakes.stepped import PACKED, Machine

SIZE = 8
STARTS = [0, 1, 6, 7, 8, 13, 14, 15, 65535]
FLAGS = PACKED & ~(1 << F_EVENT_IDX)
BOTH = pytest.mark.parametrize("features", [PACKED, FLAGS], ids=["event-idx", "flags"])
UNTIL_ASLEEP = 200
WHOLE = Framing(readable=(), writable=(), indirect=True)  # a request in one descriptor
RESERVED = 3


# ---- the device tells the driver --------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_notified_exactly_when_the_batch_passes_the_named_descriptor(
    start: int, count: int
) -> None:
    """§2.8.10: "Event will only trigger when this descriptor is made available/used", and "when
    Ring Wrap Counter matches this value": each descriptor of two whole laps is named once."""
    for named in range(start, start + 2 * SIZE):
        with Machine(features=PACKED) as machine:
            disk = machine.add_queue(SIZE, start=start)
            ring = disk.packed
            machine.ports[0].take_calls()
            ring.poke_event(ring.avail, ring.off_wrap(named), EVENT_DESC)
            for _ in range(count):
                disk.queue(Kind.FLUSH, framing=WHOLE)
            disk.publish()
            machine.step()
            assert ring.desc_at(start + count - 1).id, "the batch was not finished in one turn"
            machine.step()
            told = machine.ports[0].take_calls()
            assert told == int(named < start + count), f"descriptor {named} of {start}+{count}"


@pytest.mark.parametrize("named", [3, 4, 5])
def test_a_descriptor_that_is_skipped_within_a_chain_counts_as_passed(named: int) -> None:
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=3)
        ring = disk.packed
        machine.ports[0].take_calls()
        ring.poke_event(ring.avail, ring.off_wrap(named), EVENT_DESC)
        disk.queue(Kind.IN, room=512)  # takes 3, 4 and 5
        disk.publish()
        machine.step(2)
        assert machine.ports[0].take_calls() == 1


@BOTH
@pytest.mark.parametrize("start", STARTS)
def test_enabled_events_tell_once_a_batch(start: int, features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue(SIZE, start=start)
        ring = disk.packed
        machine.ports[0].take_calls()
        for _ in range(5):
            ring.poke_event(ring.avail, 0x7FFF, EVENT_ENABLE)
            for _ in range(3):
                disk.queue(Kind.FLUSH, framing=WHOLE)
            disk.publish()
            machine.step(2)
            assert machine.ports[0].take_calls() == 1
            assert len(disk.collect()) == 3


@BOTH
def test_disabled_events_tell_nothing(features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue(SIZE)
        ring = disk.packed
        machine.ports[0].take_calls()
        for _ in range(2 * SIZE):
            ring.poke_event(ring.avail, ring.off_wrap(ring.position), EVENT_DISABLE)
            disk.queue(Kind.FLUSH, framing=WHOLE)
            disk.publish()
            machine.step(2)
            assert machine.ports[0].take_calls() == 0
            assert len(disk.collect()) == 1


@pytest.mark.parametrize("flags", [EVENT_DESC, RESERVED], ids=["not negotiated", "reserved"])
def test_a_wish_that_means_nothing_is_answered_rather_too_often(flags: int) -> None:
    """§2.8.10: 2 is "Only valid if VIRTIO_F_RING_EVENT_IDX has been negotiated", 3 is reserved;
    a driver that is told in vain loses less than one that waits for ever."""
    with Machine(features=FLAGS) as machine:
        disk = machine.add_queue(SIZE)
        ring = disk.packed
        machine.ports[0].take_calls()
        ring.poke_event(ring.avail, ring.off_wrap(5), flags)
        disk.queue(Kind.FLUSH, framing=WHOLE)
        disk.publish()
        machine.step(2)
        assert machine.ports[0].take_calls() == 1


def test_a_wish_beyond_the_ring_harms_nobody() -> None:
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE)
        ring = disk.packed
        for off_wrap in (SIZE, 0x7FFF, 0x8000 | SIZE, 0xFFFF):
            ring.poke_event(ring.avail, off_wrap, EVENT_DESC)
            disk.queue(Kind.FLUSH, framing=WHOLE)
            disk.publish()
            machine.step()
            assert len(disk.collect()) == 1
        assert machine.queues[0].broken is None


# ---- the driver tells the device --------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_an_idle_queue_asks_for_the_very_next_descriptor(start: int) -> None:
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=start)
        ring = disk.packed
        for expected in range(start + 2, start + 22, 2):
            disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(UNTIL_ASLEEP)
            assert machine.reactor.stats().queues_armed == 1
            assert ring.device_event == (ring.off_wrap(expected), EVENT_DESC)
            disk.collect()


def test_without_event_idx_an_idle_queue_enables_and_a_busy_one_disables() -> None:
    with Machine(features=FLAGS) as machine:
        disk = machine.add_queue(SIZE)
        disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(UNTIL_ASLEEP)
        assert disk.packed.device_event.flags == EVENT_ENABLE
        disk.collect()
        disk.queue(Kind.FLUSH)
        assert disk.publish()
        machine.step(2)
        assert disk.packed.device_event.flags == EVENT_DISABLE


@BOTH
def test_a_busy_queue_asks_for_no_kick_for_many_laps(features: int) -> None:
    """A wish that lies behind would come round again after two laps; it is taken back."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(SIZE)
        disk.flush()
        kicks = machine.ports[0].kicks
        for _ in range(10 * SIZE):
            disk.queue(Kind.FLUSH)
            assert not disk.publish()
            machine.step()
            assert len(disk.collect()) == 1
        assert machine.ports[0].kicks == kicks


@BOTH
@pytest.mark.parametrize("start", STARTS)
def test_a_request_published_at_any_moment_is_served(start: int, features: int) -> None:
    """Between the last work and sleep there are some turns; publish after each of them."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(SIZE, start=start)
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
