"""Guests that ask for as much as they can: they pay with their own share, the others go on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.driver import Framing, Kind, Session, segment_bytes
from tests.fakes.memory import Layout
from tests.fakes.process import TargetProcess
from tests.fakes.ring import Segment
from tests.hostile.vhost_user.neighbour import Neighbour

DISK_BYTES = 8 << 20
ROOMY = (Layout(0, 24 << 20),)


@pytest.fixture(params=["Bad0", "File0"], ids=["malloc", "file"])
def disk_path(
    target: TargetProcess, nobody_notices: None, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A controller on a disk in memory, or on a file in the page cache."""
    yield target.controller("greedy", request.param)
    target.rpc("vhost_delete_controller", ctrlr="greedy", force=True)


@pytest.mark.parametrize("cuts", [(), (5 << 20,), (1024, (2 << 20) - 1024, 512), (65536,) * 100])
def test_a_request_as_long_as_the_disk_is_right(disk_path: Path, cuts: tuple[int, ...]) -> None:
    data = random.Random(len(cuts)).randbytes(DISK_BYTES)
    with Session(disk_path, size=128, layouts=ROOMY) as session:
        session.disk.write(0, data, Framing(readable=(16, *cuts)))
        assert session.disk.read(0, DISK_BYTES, Framing(writable=cuts)) == data


def test_a_ring_full_of_such_requests(disk_path: Path, neighbour: Neighbour) -> None:
    """Hundreds of reads of the whole disk, all into the same few pages."""
    with Session(disk_path, size=1024) as session:
        memory = session.memory
        buffer = memory.allocate(1 << 20)
        for _ in range(90):
            header, status = memory.allocate(16), memory.allocate(1)
            memory.write(header, bytes(16))
            session.disk.queue_chain(
                [Segment(header, 16, False)],
                [*[Segment(buffer, 1 << 20, True)] * 8, Segment(status, 1, True)],
            )
        session.disk.publish()
        neighbour.expect_progress(50)


def test_clearing_the_whole_disk_without_pause(disk_path: Path, neighbour: Neighbour) -> None:
    with Session(disk_path, size=256) as session:
        for _ in range(5):
            for _ in range(60):
                everything = segment_bytes(0, DISK_BYTES // 512)
                session.disk.queue(Kind.WRITE_ZEROES, data=everything)
            session.disk.publish()
            neighbour.expect_progress(5)
            session.disk.wait_all()


def test_many_queues_that_are_never_idle(disk_path: Path, neighbour: Neighbour) -> None:
    with Session(disk_path, queues=32, size=64) as session:
        for _ in range(5):
            for disk in session.drivers:
                for n in range(16):
                    disk.queue(Kind.IN, 8 * n, room=4096)
                disk.publish()
            neighbour.expect_progress(5)
            for disk in session.drivers:
                disk.wait_all()
