"""The fake driver against qemu-storage-daemon, which knows nothing of us: a judge of the fake.

If these fail, no verdict of the fake driver about our own target is worth anything.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    Framing,
    Kind,
    Session,
    Status,
    segment_bytes,
)
from tests.fakes.front_end import FrontEnd
from tests.fakes.memory import adjacent

pytestmark = pytest.mark.needs_qemu

DISK_BYTES = 8 << 20
OPTIONS = "writable=on,num-queues=4,logical-block-size=512"


@pytest.fixture(scope="module")
def qemu_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """qemu-storage-daemon with one writable disk of four queues."""
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is missing: install qemu-system-common"
    folder = tmp_path_factory.mktemp("qsd")
    image, socket = folder / "disk.img", folder / "blk.sock"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    command = [
        program,
        "--blockdev",
        f"driver=file,node-name=f0,filename={image},discard=unmap",
        "--export",
        f"type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={socket},{OPTIONS}",
    ]
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert daemon.poll() is None, "qemu-storage-daemon ended at once"
                assert time.monotonic() < deadline, "no socket after 30 s"
                time.sleep(0.02)
            yield socket
        finally:
            daemon.terminate()


@pytest.fixture(params=["plain", "no-event-idx", "no-indirect", "wrapping"])
def session(qemu_socket: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    without = {"no-event-idx": [F_EVENT_IDX], "no-indirect": [F_INDIRECT]}.get(request.param, [])
    start = 65530 if request.param == "wrapping" else 0
    with Session(qemu_socket, size=32, without=without, start=start) as session:
        yield session


def test_what_was_written_is_read_back_past_the_wrap_of_the_index(session: Session) -> None:
    rng = random.Random(1)
    for turn in range(40):
        data = rng.randbytes(4096)
        session.disk.write(8 * turn, data)
        assert session.disk.read(8 * turn, 4096) == data
    session.disk.flush()


def test_config_space_tells_the_capacity(session: Session) -> None:
    assert session.capacity() == DISK_BYTES // 512


def test_the_identifier_is_answered(session: Session) -> None:
    assert session.disk.get_id().split(b"\0")[0] == b"vhost_user_blk"


def test_zeroes_and_discard(session: Session) -> None:
    session.disk.write(64, b"\xa5" * 8192)
    session.disk.write_zeroes(64, 8)
    assert session.disk.read(64, 8192) == bytes(4096) + b"\xa5" * 4096
    session.disk.discard(64, 16)


def test_statuses_of_bad_requests(session: Session) -> None:
    past_the_end = session.disk.request(Kind.IN, DISK_BYTES // 512, room=512)
    assert past_the_end.status == Status.IOERR
    unknown = session.disk.request(99, 0, room=0)
    assert unknown.status == Status.UNSUPP
    both = segment_bytes(0, 8) + segment_bytes(64, 8)
    assert session.disk.request(Kind.WRITE_ZEROES, data=both).status != Status.OK
    assert session.disk.read(0, 512) is not None


def test_any_framing_of_header_and_data(session: Session) -> None:
    data = random.Random(2).randbytes(4096)
    indirect = bool(session.front_end.features >> F_INDIRECT & 1)
    framing = Framing(readable=(4, 12, 1000, 96), indirect=indirect)
    session.disk.write(128, data, framing)
    framing = Framing(writable=(512, 1, 3000, 583), indirect=indirect)
    assert session.disk.read(128, 4096, framing) == data


def test_buffers_that_span_two_regions(qemu_socket: Path) -> None:
    layouts = adjacent([1 << 20, 4096, 4096, 1 << 20])
    with Session(qemu_socket, layouts=layouts) as session:
        data = random.Random(3).randbytes(1 << 20)
        session.disk.write(1024, data)
        assert session.disk.read(1024, 1 << 20) == data


def test_many_in_flight_on_four_queues(qemu_socket: Path) -> None:
    with Session(qemu_socket, queues=4) as session:
        for number, disk in enumerate(session.drivers):
            for block in range(16):
                disk.queue(Kind.OUT, 8 * (16 * number + block), bytes([16 * number + block]) * 4096)
            disk.publish()
        for disk in session.drivers:
            disk.wait_all()
        for block in range(64):
            assert session.disk.read(8 * block, 4096) == bytes([block]) * 4096


def test_the_last_avail_index_comes_back(session: Session) -> None:
    for sector in range(10):
        session.disk.read(sector, 512)
    assert session.front_end.get_vring_base(0) == session.disk.ring.avail_idx


def test_a_broken_message_ends_the_connection_and_the_next_is_served(qemu_socket: Path) -> None:
    with FrontEnd(qemu_socket) as front:
        front.send_raw(b"\xff" * 12)
        assert front.hung_up()
    with Session(qemu_socket) as session:
        session.disk.read(0, 512)
