"""Rings that lie, in a real target: the queue is given up, its neighbours are not."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import time

import pytest

from tests.fakes.driver import BlkDriver, Kind, Session
from tests.fakes.front_end import HungUp, Refused
from tests.fakes.malice import BAD_CHAINS, BAD_RINGS
from tests.fakes.process import wait_until
from tests.fakes.ring import Segment
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.giving_up import (
    SIZE,
    expect_a_new_start,
    expect_one_queue_given_up,
    expect_random_rings_to_harm_nobody,
    wait_for_error,
)
from tests.hostile.vhost_user.neighbour import Neighbour
from tests.hostile.vhost_user.test_messages import drain_to_the_end


@pytest.mark.parametrize("name", BAD_RINGS)
def test_a_bad_ring_is_given_up_with_a_sentence(victim: Victim, name: str) -> None:
    expect_one_queue_given_up(victim, lambda disk: BAD_RINGS[name](disk.ring))


@pytest.mark.parametrize("name", BAD_RINGS)
def test_a_ring_that_is_bad_from_the_start(victim: Victim, name: str) -> None:
    """What firmware leaves behind: no request was ever right on it."""
    with Session(victim.path, queues=1, size=SIZE, start=65530) as session:
        BAD_RINGS[name](session.disk.ring)
        session.disk.port.kick()
        wait_for_error(session.ports[0])
        base = session.front_end.get_vring_base(0)
        assert 0 <= base <= 0xFFFF


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_a_bad_chain_comes_back_empty(victim: Victim, name: str) -> None:
    with Session(victim.path, size=SIZE) as session:
        ring = session.disk.ring
        BAD_CHAINS[name](ring)
        session.disk.port.kick()
        wait_until(lambda: ring.used_idx == 1, "the chain to come back")
        assert ring.used_at(0) == (0, 0)
        assert session.ports[0].take_errors() == 0


def test_a_broken_queue_starts_anew_after_a_stop(victim: Victim) -> None:
    expect_a_new_start(victim, lambda disk: BAD_RINGS["head_far_out_of_range"](disk.ring))


def test_a_head_offered_twice_in_one_batch_is_never_answered_more_than_twice(
    victim: Victim,
) -> None:
    """In memory a request is done before the next is taken; then both are legal to answer."""
    with Session(victim.path, size=SIZE) as session:
        pending = session.disk.queue(Kind.WRITE_ZEROES, data=bytes(8) + b"\0\x20\0\0" + bytes(4))
        ring = session.disk.ring
        ring.poke_avail(ring.avail_idx, pending.head)
        ring.poke_avail_idx(ring.avail_idx + 1)
        session.disk.port.kick()
        wait_for_error(session.ports[0])
        victim.expect_sentence("queue 0 is given up")
        assert ring.used_idx <= 1


def test_a_ring_that_changes_while_it_is_read(victim: Victim, neighbour: Neighbour) -> None:
    """Descriptors rewritten without pause under the target's eyes: read once, then used."""
    rng = random.Random(5)
    with Session(victim.path, size=SIZE) as session:
        ring, memory = session.disk.ring, session.memory
        good = memory.allocate(4096)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            ring.poke_desc(0, good, 16, 1, 1)
            ring.poke_desc(1, good, 512, 3, 2)
            ring.poke_desc(2, good + 1024, 1, 2, 0)
            ring.poke_avail(ring.avail_idx, 0)
            ring._avail_idx += 1
            ring.poke_avail_idx(ring.avail_idx)
            session.disk.port.kick()
            for _ in range(20):
                addr = rng.choice([good, 0xDEAD_0000_0000, (1 << 64) - 8, 0])
                length = rng.choice([0, 1, 16, 512, 0xFFFF_FFFF])
                ring.poke_desc(rng.randrange(3), addr, length, rng.randrange(8), rng.randrange(20))
            if session.ports[0].take_errors():
                session.front_end.get_vring_base(0)
                session.start_again(0)
                ring = session.disk.ring
        neighbour.expect_progress()


# ---- rings where none belong ------------------------------------------------------------


def test_two_queues_that_share_one_ring(victim: Victim, neighbour: Neighbour) -> None:
    """Both take every request: the driver's loss. Neither may take down anything else."""
    with Session(victim.path, size=64) as session, contextlib.suppress(HungUp, Refused):
        shared = session.disk
        second = session.prepare_queue(64)
        session.start_queue_on(1, shared.ring, session.ports[1])
        for n in range(40):
            shared.queue(Kind.IN, 8 * n % 64, room=512)
            shared.ring.publish()
            for port in session.ports:
                port.kick()
            if n % 8 == 0:
                neighbour.expect_progress(1)
            shared.pending.clear()
            if shared.ring.free_descriptors < 4:
                break
        assert second.ring is not shared.ring
        session.front_end.get_vring_base(0)
        session.front_end.get_vring_base(1)


@pytest.mark.parametrize(
    "parts", [("desc", "desc", "desc"), ("desc", "desc", "used"), ("avail", "avail", "avail")]
)
def test_rings_that_lie_over_each_other(
    victim: Victim, neighbour: Neighbour, parts: tuple[str, str, str]
) -> None:
    with Session(victim.path, queues=0) as session, contextlib.suppress(HungUp, Refused):
        disk, port = session.prepare_queue(64), session.ports[0]
        desc, avail, used = (session.memory.user_addr(getattr(disk.ring, part)) for part in parts)
        front = session.front_end
        front.set_vring_num(0, 64)
        front.set_vring_addr(0, desc, avail & ~15, used & ~15)
        front.set_vring_kick(0, port.kick_fd)
        front.set_vring_call(0, port.call_fd)
        front.set_vring_enable(0)
        for _ in range(20):
            disk.queue(Kind.IN, 0, room=512)
            disk.ring.publish()
            port.kick()
            disk.pending.clear()
        neighbour.expect_progress()
        front.get_vring_base(0)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_a_read_into_the_ring_itself(victim: Victim, neighbour: Neighbour, part: str) -> None:
    """The disk's bytes become descriptors or indexes: whatever they say is checked as ever."""
    with Session(victim.path, size=SIZE) as session, contextlib.suppress(HungUp, Refused):
        session.disk.write(0, random.Random(9).randbytes(4096))
        place = getattr(session.disk.ring, part)
        header, status = session.memory.allocate(16), session.memory.allocate(1)
        session.memory.write(header, bytes(16))
        session.disk.queue_chain(
            [Segment(header, 16, False)], [Segment(place, 512, True), Segment(status, 1, True)]
        )
        session.disk.ring.publish()
        session.disk.port.kick()
        neighbour.expect_progress()
        session.front_end.get_vring_base(0)


# ---- what the shared page says is only ever read once ---------------------------------


def fuzz_ring(session: Session, rng: random.Random) -> None:
    """Random descriptors, avail entries and indexes over the real ring."""
    ring = session.disk.ring
    places = [region.guest_addr + 8 * rng.randrange(1000) for region in session.memory.regions]
    places += [0, 0xDEAD_0000_0000, (1 << 64) - 1, ring.desc, ring.avail, ring.used]
    for _ in range(rng.randrange(1, 40)):
        addr = rng.choice(places) + rng.randrange(64)
        length = rng.choice([0, 1, 15, 16, 17, 32, 512, 4096, 0x10000, 0xFFFF_FFFF])
        following = rng.choice([*range(SIZE), SIZE, 0xFFFF])
        flags = rng.choice([0, 1, 2, 3, 4, 5, 7, 0xFFFF])
        ring.poke_desc(rng.randrange(SIZE), addr & (1 << 64) - 1, length, flags, following)
    for position in range(SIZE):
        ring.poke_avail(position, rng.choice([*range(SIZE), SIZE, 0xFFFF]))
    ring.poke_used_event(rng.randrange(65536))
    ring.poke_avail_flags(rng.randrange(65536))
    ring.poke_avail_idx(ring.used_idx + rng.choice([1, 2, SIZE, SIZE + 1, 0x8000, 0xFFFF]))
    session.disk.port.kick()


@pytest.mark.parametrize("seed", range(4))
def test_random_rings(victim: Victim, neighbour: Neighbour, seed: int) -> None:
    expect_random_rings_to_harm_nobody(victim, neighbour, seed, fuzz_ring)


# ---- notifiers --------------------------------------------------------------------------

WRONG_FDS = ["pipe", "socket", "file", "memfd", "null", "epoll", "device", "folder"]


def wrong_fd(kind: str) -> int:
    """A descriptor that is no eventfd; the caller closes it."""
    if kind == "pipe":
        read_end, write_end = os.pipe()
        os.close(read_end)
        return write_end
    if kind == "socket":
        ours, theirs = socket.socketpair()
        ours.close()
        return theirs.detach()
    if kind == "epoll":
        with select.epoll() as poll:
            return os.dup(poll.fileno())
    if kind == "memfd":
        return os.memfd_create("not-an-eventfd")
    path = {"file": __file__, "null": "/dev/null", "folder": "/", "device": "/dev/full"}[kind]
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize("role", ["kick", "call", "err"])
@pytest.mark.parametrize("kind", WRONG_FDS)
def test_a_notifier_that_is_no_eventfd_ends_the_session(
    victim: Victim, kind: str, role: str
) -> None:
    fd = wrong_fd(kind)
    with Session(victim.path) as session:
        session.disk.write(0, b"\x01" * 512)
        with pytest.raises((Refused, HungUp)):
            getattr(session.front_end, f"set_vring_{role}")(0, fd)
        drain_to_the_end(session.front_end)
        victim.expect_end("eventfd")
    os.close(fd)


def saturate(fd: int) -> None:
    """As full as it gets, and blocking for whoever writes next: the flag is shared."""
    os.set_blocking(fd, False)
    while True:
        try:
            os.eventfd_write(fd, (1 << 64) - 2)
            break
        except BlockingIOError:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
    os.set_blocking(fd, True)


def complete_something(disk: BlkDriver) -> None:
    disk.queue(Kind.FLUSH)
    disk.publish()


def test_a_call_eventfd_saturated_and_made_blocking(victim: Victim, neighbour: Neighbour) -> None:
    """The reactor that writes to it is stopped for a moment, then freed; the others go on."""
    with Session(victim.path, size=64) as session:
        session.disk.flush()
        session.ports[0].take_calls()
        saturate(session.ports[0].call_fd)
        complete_something(session.disk)
        neighbour.expect_progress()


def test_a_call_eventfd_saturated_again_and_again(victim: Victim, neighbour: Neighbour) -> None:
    """The other holder does not give up: after the first time it is not written any more."""
    with Session(victim.path, size=64) as session:
        session.disk.flush()
        for _ in range(10):
            saturate(session.ports[0].call_fd)
            complete_something(session.disk)
        neighbour.expect_progress()


def test_an_error_eventfd_saturated_and_made_blocking(victim: Victim, neighbour: Neighbour) -> None:
    with Session(victim.path, size=SIZE) as session:
        session.disk.flush()
        saturate(session.ports[0].err_fd)
        BAD_RINGS["head_far_out_of_range"](session.disk.ring)
        session.disk.port.kick()
        victim.expect_sentence("queue 0 is given up")
        neighbour.expect_progress()
        assert session.front_end.get_features()


def test_a_kick_eventfd_written_without_pause(victim: Victim, neighbour: Neighbour) -> None:
    with Session(victim.path) as session:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            session.ports[0].kick()
        neighbour.expect_progress()
        session.disk.write(0, b"\x01" * 512)


def test_call_and_kick_are_the_same_eventfd(victim: Victim, neighbour: Neighbour) -> None:
    """Each completion kicks its own queue: that must not become an endless loop."""
    with Session(victim.path) as session:
        port = session.ports[0]
        session.front_end.set_vring_call(0, port.kick_fd)
        session.front_end.set_vring_err(0, port.kick_fd)
        session.disk.queue(Kind.FLUSH)
        session.disk.publish()
        wait_until(lambda: bool(session.disk.collect()), "the flush")
        neighbour.expect_progress()


def test_notifiers_replaced_a_thousand_times_under_io(victim: Victim) -> None:
    with Session(victim.path) as session:
        port = session.ports[0]
        for turn in range(1000):
            session.disk.collect()
            if turn % 10 == 0 and len(session.disk.pending) < 16:
                session.disk.queue(Kind.IN, 0, room=4096)
                session.disk.publish()
            session.front_end.set_vring_kick(0, port.kick_fd)
            session.front_end.set_vring_call(0, port.call_fd if turn % 3 else None)
            session.front_end.set_vring_err(0, port.err_fd if turn % 2 else None)
        session.front_end.set_vring_call(0, port.call_fd)
        wait_until(lambda: bool(session.disk.collect()) or not session.disk.pending, "all I/O")
