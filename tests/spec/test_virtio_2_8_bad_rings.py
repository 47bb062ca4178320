"""virtio 1.3 §2.8: what a packed ring must never hold, and what we do when it does.

As with split rings: a ring that cannot be trusted is given up, its error eventfd is written, and
nobody else notices.
"""

from __future__ import annotations

import pytest

from tests.fakes.driver import BlkDriver, Kind
from tests.fakes.malice_packed import BAD_PACKED_RINGS
from tests.fakes.packed_ring import PackedRing
from tests.fakes.stepped import PACKED, Machine

SIZE = 16


def contents(ring: PackedRing) -> bytes:
    return ring.memory.read(ring.desc, 16 * ring.size)


def settle_down(machine: Machine, disk: BlkDriver) -> None:
    disk.port.kick()
    machine.step(50)


@pytest.mark.parametrize("start", [0, 12, 2 * SIZE - 4], ids=["fresh", "at a wrap", "at both"])
@pytest.mark.parametrize("name", BAD_PACKED_RINGS)
def test_a_bad_ring_stops_its_own_queue_only(name: str, start: int) -> None:
    with Machine(features=PACKED) as machine:
        bad, good = machine.add_queue(SIZE, start=start), machine.add_queue(SIZE)
        bad.write(8, b"\x5a" * 512)
        BAD_PACKED_RINGS[name](bad.packed)
        before = contents(bad.packed)
        settle_down(machine, bad)
        assert machine.queues[0].broken, "the ring is still served"
        assert machine.broken == [machine.queues[0]], "control was not told, or more than once"
        assert machine.ports[0].take_errors() == 1
        assert contents(bad.packed) == before, "something was used of it"
        assert good.read(8, 512) == b"\x5a" * 512
        assert machine.queues[1].broken is None


@pytest.mark.parametrize("name", BAD_PACKED_RINGS)
def test_a_broken_queue_stops_and_says_why(name: str) -> None:
    with Machine(features=PACKED) as machine:
        bad = machine.add_queue(SIZE)
        BAD_PACKED_RINGS[name](bad.packed)
        settle_down(machine, bad)
        why = machine.queues[0].broken
        assert why
        assert why[0].islower()
        assert not why.endswith(".")
        machine.stop_queue(0)
        assert machine.queues[0].counters().inflight == 0


@pytest.mark.parametrize("in_flight", [1, 2, 5])
@pytest.mark.parametrize("name", ["chain_that_never_ends", "chain_over_what_is_in_flight"])
def test_descriptors_in_flight_are_never_taken_again(name: str, in_flight: int) -> None:
    """Whatever their flags say: the ring has no room for more than its size."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE)
        machine.settle(machine.channel.gate())
        for _ in range(in_flight):
            disk.queue(Kind.IN, 0, room=512)
        disk.publish()
        machine.step(3)
        BAD_PACKED_RINGS[name](disk.packed)
        settle_down(machine, disk)
        assert machine.queues[0].broken == (
            f"a chain of more than {SIZE - 3 * in_flight} descriptors is longer than the ring "
            "has room for"
        )
        assert machine.queues[0].counters().inflight == in_flight
        machine.settle(machine.channel.ungate())
        machine.step(3)


def test_a_whole_ring_in_flight_that_claims_to_be_available_again() -> None:
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(4)
        machine.settle(machine.channel.gate())
        for _ in range(2):
            disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(3)
        ring = disk.packed
        ring.poke_flags(ring.position, ring.available(ring.position))
        settle_down(machine, disk)
        assert "more than 0 descriptors" in (machine.queues[0].broken or "")
        machine.settle(machine.channel.ungate())


def test_a_read_over_the_ring_itself() -> None:
    """The disk's bytes become descriptors: whatever they say is checked as ever."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE)
        ring = disk.packed
        disk.write(0, bytes(range(256)) * 2)
        pending = disk.queue(Kind.IN, 0, room=512)
        where = ring.position - 2
        data = ring.desc_at(where)
        ring.poke_desc(where, ring.desc, 256, 0, data.flags)
        disk.publish()
        settle_down(machine, disk)
        assert pending.completion is None
        other = machine.add_queue(SIZE)
        other.flush()
