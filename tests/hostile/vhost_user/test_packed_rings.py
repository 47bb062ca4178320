"""Packed rings that lie, in a real target: as with split ones, only the queue is given up."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from tests.fakes.driver import F_RING_PACKED, Kind, Session, Status
from tests.fakes.malice_packed import BAD_PACKED_RINGS, buffer_at, header_at, offer
from tests.fakes.process import wait_until
from tests.fakes.ring import F_NEXT, F_WRITE
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.giving_up import (
    SIZE,
    expect_a_new_start,
    expect_one_queue_given_up,
    expect_random_rings_to_harm_nobody,
    wait_for_error,
)
from tests.hostile.vhost_user.neighbour import Neighbour


@pytest.fixture
def packed_victim(victim: Victim) -> Iterator[Victim]:
    """A controller of its own that offers packed rings, on the same disk."""
    name = f"{victim.name}packed"
    path = victim.target.controller(name, "Bad0", packed_ring=True)
    yield Victim(victim.target, name, path)
    victim.target.rpc("vhost_delete_controller", ctrlr=name, force=True)


def expect_packed(session: Session) -> None:
    assert session.front_end.features >> F_RING_PACKED & 1, "packed rings were not negotiated"


@pytest.mark.parametrize("name", BAD_PACKED_RINGS)
def test_a_bad_ring_is_given_up_with_a_sentence(packed_victim: Victim, name: str) -> None:
    expect_one_queue_given_up(packed_victim, lambda disk: BAD_PACKED_RINGS[name](disk.packed))


@pytest.mark.parametrize("name", BAD_PACKED_RINGS)
def test_a_broken_queue_starts_anew_after_a_stop(packed_victim: Victim, name: str) -> None:
    expect_a_new_start(packed_victim, lambda disk: BAD_PACKED_RINGS[name](disk.packed))


@pytest.mark.parametrize("identity", [0, 1, SIZE - 1, SIZE, 1000, 0x7FFF, 0xFFFF])
def test_spdk_3860_a_buffer_id_is_no_index(packed_victim: Victim, identity: int) -> None:
    """The id of a packed descriptor is the driver's own: any value comes back, none is used."""
    with Session(packed_victim.path, size=SIZE) as session:
        expect_packed(session)
        ring, memory = session.disk.packed, session.memory
        for lap in range(3):
            header, status = header_at(ring), buffer_at(ring, 1)
            memory.write(header, struct.pack("<IIQ", Kind.FLUSH, 0, 0))
            position = ring.position + 2 * lap
            ring.poke_desc(
                position + 1, status, 1, identity, F_WRITE | ring.available(position + 1)
            )
            ring.poke_desc(position, header, 16, identity, F_NEXT | ring.available(position))
            session.disk.port.kick()
            wait_until(lambda at=status: memory.read(at, 1) == b"\0", "the flush")  # type: ignore[misc]
        assert session.ports[0].take_errors() == 0


def test_spdk_3879_the_same_id_twice_in_flight(packed_victim: Victim) -> None:
    """Two requests of one id are the driver's own confusion: both are answered."""
    with Session(packed_victim.path, size=SIZE) as session:
        ring, memory = session.disk.packed, session.memory
        statuses = []
        for place in (2, 0):
            header, status = header_at(ring), buffer_at(ring, 1)
            memory.write(header, struct.pack("<IIQ", Kind.FLUSH, 0, 0))
            at = ring.position + place
            ring.poke_desc(at + 1, status, 1, 7, F_WRITE | ring.available(at + 1))
            ring.poke_desc(at, header, 16, 7, F_NEXT | ring.available(at))
            statuses.append(status)
        session.disk.port.kick()
        for status in statuses:
            wait_until(lambda at=status: memory.read(at, 1) == b"\0", "the flush")  # type: ignore[misc]


def test_cve_2019_9547_a_ring_that_is_one_chain(packed_victim: Victim) -> None:
    """Every descriptor is available and continued: the chain ends with the ring."""
    with Session(packed_victim.path, size=SIZE) as session:
        ring = session.disk.packed
        data = buffer_at(ring, 512)
        offer(ring, *[(data, 16, F_NEXT)] * SIZE)
        session.disk.port.kick()
        wait_for_error(session.ports[0])
        packed_victim.expect_sentence("queue 0 is given up: .+")


# ---- any nonsense -----------------------------------------------------------------------


def stomp(session: Session, rng: random.Random) -> None:
    """Random descriptors and event areas over the real ring."""
    ring = session.disk.packed
    places = [region.guest_addr + 8 * rng.randrange(1000) for region in session.memory.regions]
    places += [0, 0xDEAD_0000_0000, (1 << 64) - 1, ring.desc]
    for _ in range(rng.randrange(1, 40)):
        addr = rng.choice(places) + rng.randrange(64)
        length = rng.choice([0, 1, 15, 16, 17, 32, 512, 4096, 0x10000, 0xFFFF_FFFF])
        flags = rng.choice([0, 1, 2, 3, 4, 5, 7]) | rng.choice([0, 0x80, 0x8000, 0x8080])
        at = rng.randrange(ring.size)
        ring.poke_desc(at, addr & (1 << 64) - 1, length, rng.randrange(0x10000), flags)
    session.memory.write(ring.avail, rng.randbytes(4))
    session.memory.write(ring.used, rng.randbytes(4))
    session.disk.port.kick()


@pytest.mark.parametrize("seed", range(2))
def test_random_rings(packed_victim: Victim, neighbour: Neighbour, seed: int) -> None:
    expect_random_rings_to_harm_nobody(packed_victim, neighbour, seed, stomp)


def test_one_queue_is_given_up_and_requests_go_on_in_the_other(packed_victim: Victim) -> None:
    with Session(packed_victim.path, queues=2, size=SIZE) as session:
        bad, good = session.drivers
        BAD_PACKED_RINGS["chain_that_never_ends"](bad.packed)
        bad.port.kick()
        for sector in range(100):
            assert good.request(Kind.IN, sector, room=512).status == Status.OK
