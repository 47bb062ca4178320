"""virtio 1.3 §2.7.5, §2.7.6: what a ring must never hold, and what we do when it does.

The specification binds the driver only; the device may answer with anything. Ours: a ring that
cannot be trusted is given up, its error eventfd is written, and nobody else notices.
"""

from __future__ import annotations

import pytest

from drivebay.dataplane.blk_queue import BlkQueue
from drivebay.errors import PeerError
from tests.fakes.driver import F_EVENT_IDX, F_VERSION_1, BlkDriver, Framing, Kind, Status
from tests.fakes.malice import BAD_CHAINS, BAD_RINGS
from tests.fakes.stepped import SERIAL, Machine

SIZE = 16


def settle_down(machine: Machine, disk: BlkDriver) -> None:
    disk.port.kick()
    machine.step(50)


@pytest.mark.parametrize("start", [0, 65535], ids=["fresh", "wrapping"])
@pytest.mark.parametrize("name", BAD_RINGS)
def test_a_bad_ring_stops_its_own_queue_only(name: str, start: int) -> None:
    with Machine() as machine:
        bad, good = machine.add_queue(SIZE, start=start), machine.add_queue(SIZE)
        bad.write(8, b"\x5a" * 512)
        used_before = bad.ring.used_idx
        BAD_RINGS[name](bad.ring)
        settle_down(machine, bad)
        assert machine.queues[0].broken, "the ring is still served"
        assert machine.broken == [machine.queues[0]], "control was not told, or more than once"
        assert machine.ports[0].take_errors() == 1
        assert bad.ring.used_idx == used_before, "a used element was published for it"
        assert good.read(8, 512) == b"\x5a" * 512
        assert machine.queues[1].broken is None
        assert machine.ports[1].take_errors() == 0


@pytest.mark.parametrize("name", BAD_RINGS)
def test_a_broken_queue_stops_and_says_why(name: str) -> None:
    with Machine() as machine:
        bad = machine.add_queue(SIZE)
        BAD_RINGS[name](bad.ring)
        settle_down(machine, bad)
        why = machine.queues[0].broken
        assert why
        assert why[0].islower()
        assert not why.endswith(".")
        machine.stop_queue(0)
        assert machine.queues[0].counters().inflight == 0


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_a_chain_that_cannot_be_answered_comes_back_empty(name: str) -> None:
    with Machine() as machine:
        disk = machine.add_queue(SIZE)
        BAD_CHAINS[name](disk.ring)
        settle_down(machine, disk)
        assert machine.queues[0].broken is None
        assert disk.ring.used_idx == 1
        assert disk.ring.used_at(0) == (0, 0)
        assert machine.queues[0].counters().bad_requests == 1


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_the_queue_goes_on_after_such_a_chain(name: str) -> None:
    with Machine() as machine:
        disk = machine.add_queue(SIZE)
        BAD_CHAINS[name](disk.ring)
        settle_down(machine, disk)
        # The driver's own books know nothing of the poked chain: a second queue's driver would
        # be out of step, so the next request is poked by the same act, and answered the same.
        disk.ring.poke_avail(1, 0)
        disk.ring.poke_avail_idx(2)
        settle_down(machine, disk)
        assert disk.ring.used_idx == 2
        assert machine.queues[0].counters().bad_requests == 2


def test_a_head_in_flight_twice_breaks_the_ring() -> None:
    with Machine() as machine:
        bad, good = machine.add_queue(SIZE), machine.add_queue(SIZE)
        machine.settle(machine.channel.gate())
        pending = bad.queue(Kind.OUT, 0, b"\x01" * 512)
        bad.publish()
        machine.step(20)
        bad.ring.poke_avail(bad.ring.avail_idx, pending.head)
        bad.ring.poke_avail_idx(bad.ring.avail_idx + 1)
        settle_down(machine, bad)
        assert machine.queues[0].broken
        machine.settle(machine.channel.ungate())
        machine.step(20)
        assert good.request(Kind.FLUSH).status == Status.OK


def test_indirect_without_the_feature_breaks_the_ring() -> None:
    features = 1 << F_VERSION_1 | 1 << F_EVENT_IDX
    with Machine(features=features) as machine:
        disk = machine.add_queue(SIZE)
        disk.queue(Kind.FLUSH, framing=Framing(indirect=True))
        disk.publish()
        settle_down(machine, disk)
        assert machine.queues[0].broken


def test_a_broken_ring_gives_its_requests_back_to_nobody() -> None:
    """What was in flight when the ring broke completes inside, and is not published."""
    with Machine() as machine:
        bad = machine.add_queue(SIZE)
        machine.settle(machine.channel.gate())
        bad.queue(Kind.IN, 0, room=512)
        bad.publish()
        machine.step(20)
        bad.ring.poke_avail_idx(bad.ring.avail_idx + 1000)
        settle_down(machine, bad)
        assert machine.queues[0].broken
        machine.settle(machine.channel.ungate())
        machine.step(20)
        assert machine.queues[0].counters().inflight == 0
        machine.stop_queue(0)


# ---- set-up -------------------------------------------------------------------------------


def make(machine: Machine, **changes: int) -> BlkQueue:
    """A queue whose ring addresses are right but for the changes."""
    ring = machine.add_queue(SIZE).ring
    memory = machine.memory
    values = {
        "size": SIZE,
        "desc": memory.user_addr(ring.desc),
        "avail": memory.user_addr(ring.avail),
        "used": memory.user_addr(ring.used),
    }
    values.update(changes)
    return BlkQueue(
        machine.channel,
        machine.table,
        index=9,
        base=0,
        features=machine.features,
        readonly=False,
        write_through=False,
        serial=SERIAL,
        on_broken=machine.broken.append,
        inflight=None,
        **values,
    )


@pytest.mark.parametrize("size", [0, 3, 48, 1000, 1023, 2048, 32768, 65536])
def test_a_queue_size_that_is_no_power_of_two_to_1024_is_refused(size: int) -> None:
    """§2.7: "Queue Size is always a power of 2"; ours is at most 1,024."""
    with Machine() as machine, pytest.raises(PeerError, match=str(size)):
        make(machine, size=size)


@pytest.mark.parametrize(("part", "offset"), [("desc", 8), ("desc", 1), ("avail", 1), ("used", 2)])
def test_a_misaligned_ring_is_refused(part: str, offset: int) -> None:
    """§2.7: descriptors on 16 bytes, avail ring on 2, used ring on 4."""
    with Machine() as machine:
        disk = machine.add_queue(SIZE)
        right = machine.memory.user_addr(getattr(disk.ring, part))
        with pytest.raises(PeerError, match=part):
            make(machine, **{part: right + offset})


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("place", ["nowhere", "zero", "the top", "over the end", "guest address"])
def test_a_ring_outside_memory_is_refused(part: str, place: str) -> None:
    with Machine() as machine:
        last = machine.memory.regions[-1]
        addresses = {
            "nowhere": 0xDEAD_0000,
            "zero": 0,
            "the top": (1 << 64) - 16,
            "over the end": last.user_addr + last.size - 16,
            "guest address": last.guest_addr,
        }
        with pytest.raises(PeerError, match=part):
            make(machine, **{part: addresses[place]})
