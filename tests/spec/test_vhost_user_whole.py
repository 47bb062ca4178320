"""vhost-user from the socket to the disk and back: the real data plane under a real session.

The front end and the driver are the pure-Python ones of tests/fakes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.memory.guest_memory import mapped_regions
from tests.fakes.descriptors import more_fds_than, open_fds
from tests.fakes.driver import F_FLUSH, Kind, Session, Status
from tests.fakes.front_end import F_PROTOCOL_FEATURES, HEADER, VERSION, Protocol
from tests.spec.whole_target import SECTORS, Target, serving_target


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with serving_target(tmp_path) as running:
        yield running


def pattern(number: int, length: int = 4096) -> bytes:
    return bytes((number * 7 + i) & 0xFF for i in range(length))


def verify(session: Session, rounds: int = 3) -> None:
    """Write and read back through every queue."""
    for number in range(rounds):
        for index, driver in enumerate(session.drivers):
            data = pattern(number + index)
            driver.write((index + 1) * 8, data)
            assert driver.read((index + 1) * 8, len(data)) == data


def test_every_kind_of_request_on_four_queues(target: Target) -> None:
    with Session(target.socket, queues=4) as session:
        verify(session)
        session.disk.flush()
        assert session.disk.get_id() == b"M0".ljust(20, b"\0")
        session.disk.discard(8, 8)
        session.disk.write_zeroes(16, 8)
        assert session.disk.read(8, 8192) == bytes(8192)
        shown = target.run(target.describe())["sessions"][0]
        assert (shown["started"], shown["max_queues"]) == (True, 4)


@pytest.mark.parametrize("start", [0, 65535])
def test_a_ring_goes_on_where_get_vring_base_left_it(target: Target, start: int) -> None:
    with Session(target.socket, start=start) as session:
        front = session.front_end
        for number in range(3):
            data = pattern(number)
            session.disk.write(0, data)
            base = front.get_vring_base(0)
            assert base == (start + 2 * number + 1) & 0xFFFF
            front.set_vring_kick(0, session.ports[0].kick_fd)
            assert session.disk.read(0, len(data)) == data


def test_requests_wait_while_a_ring_is_disabled_and_no_kick_is_needed_after(
    target: Target,
) -> None:
    with Session(target.socket) as session:
        session.front_end.set_vring_enable(0, False)
        pending = session.disk.queue(Kind.IN, 0, room=512)
        session.disk.publish()
        assert session.disk.collect() == []
        session.front_end.set_vring_enable(0)
        assert session.disk.wait(pending).status == Status.OK


def test_a_front_end_without_protocol_features_is_served(target: Target) -> None:
    with Session(target.socket, without=()) as session:
        front = session.front_end
        front.get_vring_base(0)
        front.set_features(front.features & ~(1 << F_PROTOCOL_FEATURES))
        front.set_vring_kick(0, session.ports[0].kick_fd)
        verify(session)


def test_resize_is_told_and_seen(target: Target) -> None:
    disk = target.registry.get("M0")
    target.run(target.registry.resize(disk, SECTORS // 2))
    with Session(target.socket) as session, session.front_end.set_backend_req_fd() as channel:
        assert session.capacity() == SECTORS // 2
        target.run(target.registry.resize(disk, SECTORS))
        assert channel.recv(64) == HEADER.pack(2, VERSION, 0)
        assert session.capacity() == SECTORS


def test_hot_remove_leaves_a_disk_on_which_everything_fails(target: Target) -> None:
    with Session(target.socket, queues=2) as session:
        verify(session)
        with session.front_end.set_backend_req_fd() as channel:
            target.run(target.registry.remove("M0"))
            assert channel.recv(64) == HEADER.pack(2, VERSION, 0)
        assert session.capacity() == 0
        assert target.registry.removed_but_held() == 0
        for driver in session.drivers:
            assert driver.request(Kind.IN, 0, room=512).status == Status.IOERR
            assert driver.request(Kind.OUT, 0, b"x" * 512).status == Status.IOERR
            assert driver.request(Kind.FLUSH).status == Status.IOERR
        described = target.run(target.describe())
        assert described["backend_specific"]["block"]["bdev"] is None
        # A reboot of the guest finds the same, and so does somebody new.
        session.front_end.get_vring_base(0)
        session.front_end.set_vring_kick(0, session.ports[0].kick_fd)
        assert session.disk.request(Kind.IN, 0, room=512).status == Status.IOERR
        with Session(target.socket) as other:
            assert other.capacity() == 0
            assert other.disk.request(Kind.IN, 0, room=512).status == Status.IOERR


def test_a_bad_ring_is_given_up_alone(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    with Session(target.socket, queues=2) as session, Session(target.socket) as other:
        verify(session)
        ring = session.drivers[0].ring
        session.memory.store_u16(ring.avail + 2, ring.size + 500)
        session.ports[0].kick()
        assert os.eventfd_read(_blocking(session.ports[0].err_fd)) == 1
        session.drivers.pop(0)
        verify(session)
        verify(other)
        assert session.front_end.get_status() & 0x40
    (sentence,) = [text for text in caplog.messages if "given up" in text]
    assert "session 'vhost.0s0': queue 0" in sentence
    assert "avail.idx jumped" in sentence


def _blocking(fd: int) -> int:
    os.set_blocking(fd, True)
    return fd


def test_truncated_memory_ends_its_session_alone(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(target.socket) as other:
        session = Session(target.socket)
        verify(session)
        for region in session.memory.regions:
            os.ftruncate(region.fd, 0)
        session.ports[0].kick()
        assert session.front_end.hung_up()
        verify(other)
        session.close()
    target.until_empty()
    assert "guest memory was truncated" in caplog.text


def test_coming_and_going_leaks_nothing(target: Target) -> None:
    with Session(target.socket) as session:
        verify(session, 1)
    target.until_empty()
    before = open_fds()
    for _ in range(15):
        with Session(target.socket, queues=3) as session:
            verify(session, 1)
    target.until_empty()
    assert not more_fds_than(before)
    assert mapped_regions() == 0


def test_a_session_without_flush_is_write_through(target: Target) -> None:
    with Session(target.socket, without=(F_FLUSH,)) as session:
        assert session.front_end.has(Protocol.CONFIG)
        assert session.front_end.get_config(32, 1) == b"\0"
        verify(session)
