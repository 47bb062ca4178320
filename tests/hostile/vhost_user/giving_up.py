"""What is the same for rings of each kind: one of them lies, and only its queue is given up."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable

from tests.fakes.driver import BlkDriver, EventPort, Session
from tests.fakes.front_end import HungUp
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.neighbour import Neighbour

SIZE = 16
RANDOM_SECONDS = 3.0

Spoil = Callable[[BlkDriver], None]


def wait_for_error(port: EventPort) -> None:
    poll = select.poll()
    poll.register(port.err_fd, select.POLLIN)
    assert poll.poll(30_000), "the error eventfd was never written"


def expect_one_queue_given_up(victim: Victim, spoil: Spoil) -> None:
    with Session(victim.path, queues=2, size=SIZE) as session:
        bad, good = session.drivers
        bad.write(0, b"\x11" * 512)
        spoil(bad)
        bad.port.kick()
        wait_for_error(session.ports[0])
        victim.expect_sentence("queue 0 is given up: .+")
        assert good.read(0, 512) == b"\x11" * 512
        assert session.ports[1].take_errors() == 0
        assert session.front_end.get_features(), "the session itself goes on"


def expect_a_new_start(victim: Victim, spoil: Spoil) -> None:
    """A guest that reboots gets its disk back without a new session."""
    with Session(victim.path, size=SIZE) as session:
        spoil(session.disk)
        session.disk.port.kick()
        wait_for_error(session.ports[0])
        session.front_end.get_vring_base(0)
        disk = session.start_queue(0, SIZE)
        disk.write(0, b"\x33" * 512)
        assert disk.read(0, 512) == b"\x33" * 512


def expect_random_rings_to_harm_nobody(
    victim: Victim,
    neighbour: Neighbour,
    seed: int,
    stomp: Callable[[Session, random.Random], None],
) -> None:
    """Some seconds of nonsense, reproducible from the seed up to thread timing."""
    rng = random.Random(seed)
    deadline = time.monotonic() + RANDOM_SECONDS
    while time.monotonic() < deadline:
        with Session(victim.path, size=SIZE, start=rng.choice([0, 65530])) as session:
            for _ in range(20):
                stomp(session, rng)
                if rng.randrange(4) == 0:
                    try:
                        session.front_end.get_features()
                    except HungUp:
                        break
        neighbour.expect_progress(1)
