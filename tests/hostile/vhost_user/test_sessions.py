"""Sessions that come, go and overlap at the worst moments; descriptors that run out."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time

import pytest

from tests.fakes.driver import Kind, Session, Status, segment_bytes
from tests.fakes.front_end import (
    HEADER,
    VERSION,
    FrontEnd,
    HungUp,
    Refused,
    Request,
    close_all,
)
from tests.fakes.process import TargetProcess, wait_until
from tests.hostile.vhost_user.conftest import OPEN_FILES, Victim
from tests.hostile.vhost_user.neighbour import Neighbour

PAIR = struct.Struct("=II")


def fill(session: Session) -> None:
    """A full ring of everything there is, the slow kinds too."""
    for disk in session.drivers:
        for n in range(16):
            disk.queue(Kind.OUT, 64 * n, b"\x77" * 16384)
            disk.queue(Kind.IN, 64 * n, room=16384)
        disk.queue(Kind.WRITE_ZEROES, data=segment_bytes(0, 16384))
        disk.publish()


def test_hang_up_with_everything_in_flight(victim: Victim) -> None:
    for _ in range(10):
        with Session(victim.path, queues=2, size=128) as session:
            fill(session)
    victim.expect_sentence()


def test_reset_with_everything_in_flight(victim: Victim) -> None:
    """Afterwards the device is as new: features are negotiated and rings started again."""
    for _ in range(10):
        with Session(victim.path, queues=2, size=128) as session:
            fill(session)
            features = session.front_end.features
            session.front_end.reset_device()
            session.front_end.set_features(features)
            disk = session.start_queue(0)
            disk.write(0, b"\x42" * 512)
            assert disk.read(0, 512) == b"\x42" * 512


def test_stop_with_everything_in_flight_answers_when_it_has_drained(victim: Victim) -> None:
    for _ in range(10):
        with Session(victim.path, size=128) as session:
            fill(session)
            base = session.front_end.get_vring_base(0)
            disk = session.disk
            disk.collect()
            taken = base - disk.ring.start & 0xFFFF
            assert taken == disk.ring.used_idx, "stopped with a request neither taken nor answered"
            used = disk.memory.read(disk.ring.used, 6 + 8 * disk.ring.size)
            time.sleep(0.02)
            assert disk.memory.read(disk.ring.used, 6 + 8 * disk.ring.size) == used


def test_a_storm_of_reconnects(victim: Victim, neighbour: Neighbour) -> None:
    for _ in range(100):
        with Session(victim.path) as session:
            session.disk.queue(Kind.IN, 0, room=4096)
            session.disk.publish()
    neighbour.expect_progress()


def test_a_storm_of_connections_that_say_nothing(victim: Victim, neighbour: Neighbour) -> None:
    for _ in range(500):
        FrontEnd(victim.path).close()
    neighbour.expect_progress()
    with FrontEnd(victim.path) as front:
        assert front.get_features()


def test_a_queue_started_and_stopped_again_and_again(victim: Victim) -> None:
    with Session(victim.path) as session:
        for turn in range(100):
            session.disk.queue(Kind.IN, 0, room=512)
            session.disk.publish()
            session.front_end.get_vring_base(0)
            session.start_again(0)
            if turn % 10 == 0:
                session.disk.write(0, b"\x01" * 512)


def test_the_kick_comes_before_everything_else(victim: Victim) -> None:
    """Not an order that QEMU uses. Either the ring starts when the rest is there, or the
    session ends with a sentence; it never serves a ring that it does not know."""
    with Session(victim.path, queues=0) as session:
        front = session.front_end
        disk, port = session.prepare_queue(64), session.ports[0]
        try:
            front.set_vring_kick(0, port.kick_fd)
            front.set_vring_call(0, port.call_fd)
            front.set_vring_enable(0)
            front.set_vring_num(0, 64)
            session.set_addresses(0, disk.ring)
        except (Refused, HungUp):
            victim.expect_end()
            return
        disk.write(0, b"\x01" * 512)


def test_enabled_and_disabled_without_pause(victim: Victim) -> None:
    with Session(victim.path) as session:
        for turn in range(300):
            session.disk.queue(Kind.FLUSH)
            session.disk.publish()
            session.front_end.set_vring_enable(0, bool(turn % 2))
            if turn % 8 == 7:  # enabled now
                session.disk.wait_all()


def test_64_queues_of_one_session(victim: Victim) -> None:
    with Session(victim.path, queues=64, size=4) as session:
        for number, disk in enumerate(session.drivers):
            disk.write(8 * number, bytes([number]) * 512)
        for number in range(64):
            assert session.drivers[63 - number].read(8 * number, 512) == bytes([number]) * 512
        with pytest.raises((HungUp, Refused)):
            session.front_end.set_vring_num(256, 64)


# ---- the disk goes away ----------------------------------------------------------------


def test_the_disk_is_deleted_under_io_and_the_guest_restarts(
    target: TargetProcess, neighbour: Neighbour
) -> None:
    """Everything in flight is answered; a guest that restarts meanwhile finds an empty disk."""
    for _ in range(10):
        target.malloc("Gone0", 8)
        path = target.controller("gone", "Gone0")
        with Session(path, queues=2, size=128) as session:
            fill(session)
            target.rpc("bdev_malloc_delete", name="Gone0")
            for disk in session.drivers:
                disk.wait_all()
            assert session.disk.request(Kind.IN, 0, room=512).status == Status.IOERR
            assert session.capacity() == 0
        with Session(path) as again:
            assert again.disk.request(Kind.IN, 0, room=512).status == Status.IOERR
        target.rpc("vhost_delete_controller", ctrlr="gone", force=True)
    neighbour.expect_progress()


def test_a_controller_deleted_by_force_under_io(target: TargetProcess) -> None:
    for _ in range(10):
        path = target.controller("gone", "Bad0")
        with Session(path, queues=2, size=128) as session:
            fill(session)
            target.rpc("vhost_delete_controller", ctrlr="gone", force=True)
            assert session.front_end.hung_up()
            assert not path.exists()


# ---- running out of descriptors ----------------------------------------------------------


def test_256_sessions_at_once_on_1024_descriptors(
    victim: Victim, target: TargetProcess, neighbour: Neighbour
) -> None:
    """The target was started with a hard limit of 1,024. Whoever does not fit is refused with a
    sentence; all others are served, the target still answers RPC, and all is well after."""
    sessions: list[Session] = []
    refused = 0
    try:
        for _ in range(256):
            try:
                sessions.append(Session(victim.path, size=8))
            except (HungUp, Refused, ConnectionError):
                refused += 1
        assert len(sessions) >= 200
        assert neighbour.error is None
        target.rpc("vhost_get_controllers")
        for number, session in enumerate(sessions):
            session.disk.write(8 * (number % 64), bytes([number % 256]) * 512)
        neighbour.expect_progress()
    finally:
        for session in sessions:
            session.close()
    if refused:
        victim.target.wait_for_line("descriptors|open files|Too many", victim.mark)
    with Session(victim.path) as session:
        session.disk.write(0, b"\x01" * 512)


def test_connections_beyond_the_limit_wait_or_are_refused(
    victim: Victim, target: TargetProcess, neighbour: Neighbour
) -> None:
    """Nothing but connections, more than there are descriptors: accept must not spin."""
    fronts: list[FrontEnd] = []
    try:
        for _ in range(1100):
            try:
                fronts.append(FrontEnd(victim.path, timeout=0.5))
            except (BlockingIOError, ConnectionError, TimeoutError):
                # It has no descriptors left, or is only slow to accept on a busy machine.
                if target.open_files() >= OPEN_FILES:
                    break
        neighbour.expect_progress()
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(target.rpc_path))
            # From the start of the log: a shortage before this one may have used up the limit
            # on such lines for a while.
            target.wait_for_line("a connection to the RPC socket must wait", 0)
    finally:
        for front in fronts:
            front.close()
    wait_until(lambda: answers(target), "an RPC answer after the flood")
    with Session(victim.path) as session:
        session.disk.write(0, b"\x01" * 512)


def answers(target: TargetProcess) -> bool:
    try:
        target.rpc("vhost_get_controllers")
    except OSError:
        return False
    return True


# ---- random messages -----------------------------------------------------------------------


def random_message(rng: random.Random, front: FrontEnd) -> None:
    """Mostly well-formed, mostly known, with numbers from the edges."""
    request = rng.choice([*Request, *Request, rng.randrange(64), rng.getrandbits(32)])
    edges = [0, 1, 2, 7, 8, 255, 256, 257, 4096, 1 << 31, (1 << 32) - 1, (1 << 64) - 1]
    words = [rng.choice([*edges, rng.getrandbits(64)]) for _ in range(rng.randrange(9))]
    payload = b"".join(struct.pack("=Q", word) for word in words)
    if rng.randrange(3) == 0:
        payload = PAIR.pack(rng.choice([0, 1, 255, 256]), rng.choice([0, 1, 4, 64, 1 << 16]))
    size = len(payload) if rng.randrange(10) else rng.choice([0, 1, len(payload) + 1, 1 << 31])
    flags = VERSION if rng.randrange(10) else rng.getrandbits(4)
    fds = [front.socket.fileno()] * rng.choice([0, 0, 0, 1, 2, 8, 9])
    front.send_raw(HEADER.pack(request, flags, size) + payload, fds)


@pytest.mark.parametrize("seed", range(4))
def test_random_messages(victim: Victim, neighbour: Neighbour, seed: int) -> None:
    """Four times two seconds; half of the sessions run I/O when it begins."""
    rng = random.Random(seed)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        with Session(victim.path, queues=rng.randrange(2), size=16) as session:
            front = session.front_end
            front.socket.settimeout(0.05)
            for disk in session.drivers:
                disk.queue(Kind.IN, 0, room=4096)
                disk.publish()
            with contextlib.suppress(HungUp):
                for _ in range(rng.randrange(1, 20)):
                    random_message(rng, front)
                    with contextlib.suppress(TimeoutError):
                        close_all(front.receive().fds)
        neighbour.expect_progress(1)


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes(victim: Victim, neighbour: Neighbour, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        with FrontEnd(victim.path) as front, contextlib.suppress(HungUp):
            front.send_raw(rng.randbytes(rng.randrange(1, 400)))
    neighbour.expect_progress()
