"""A migration's log that cannot be trusted: its place, its size, its file, its end.

CVE-2020-10722 was an offset and a size that wrap: the log lay before its mapping then.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from tests.fakes.dirty_log import DirtyLog
from tests.fakes.driver import Kind, Session
from tests.fakes.front_end import F_LOG_ALL, FrontEnd, HungUp, Request
from tests.fakes.memory import PAGE
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.test_messages import ALL_ONES, drain_to_the_end, negotiated

TOP = ALL_ONES - PAGE + 1
SIZE = 1 << 18  # of the file, and enough for guest memory up to 8 GiB


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


# (size, offset)
AREAS: dict[str, tuple[int, int]] = {
    "no size": (0, 0),
    "a size of 2^64-1": (ALL_ONES, 0),
    "a size of 2^63": (1 << 63, 0),
    "a size beyond the file": (SIZE + 1, 0),
    "an offset of 2^64-1": (SIZE, ALL_ONES),
    "an offset that is not aligned": (64, 4),
    "an offset at the file's end": (PAGE, SIZE),
    "an offset and size over the file's end": (2 * PAGE, SIZE - PAGE),
    "an offset and size that wrap": (2 * PAGE, TOP),
    "an offset and size of exactly 2^64": (PAGE, TOP),
    "an offset and size that wrap into the file": (SIZE - TOP & ALL_ONES, TOP),
    "the greatest of both": (ALL_ONES, ALL_ONES),
}


def send_log(front: FrontEnd, size: int, offset: int, fd: int) -> None:
    with pytest.raises(HungUp):
        front.set_log_base(size, offset, fd)


@pytest.mark.parametrize("what", AREAS)
def test_a_log_that_lies_ends_the_session(victim: Victim, memfd: int, what: str) -> None:
    with negotiated(victim) as front:
        send_log(front, *AREAS[what], memfd)
        victim.expect_end("log")


@pytest.mark.parametrize("what", ["no size", "an offset and size that wrap"])
def test_a_log_that_lies_while_another_is_in_use(victim: Victim, memfd: int, what: str) -> None:
    with Session(victim.path) as session, DirtyLog(session.memory) as log:
        front = session.front_end
        log.send(front)
        front.set_features(front.features | 1 << F_LOG_ALL)
        session.disk.read(0, 4096)
        send_log(front, *AREAS[what], memfd)
        victim.expect_end("log")


def test_a_log_without_its_descriptor_ends_the_session(victim: Victim) -> None:
    with negotiated(victim) as front:
        front.send(Request.SET_LOG_BASE, struct.pack("=QQ", SIZE, 0))
        drain_to_the_end(front)
        victim.expect_end("with 0 file descriptors")


def test_a_log_in_a_file_of_the_wrong_kind_ends_the_session(victim: Victim) -> None:
    reading, writing = os.pipe()
    with negotiated(victim) as front:
        send_log(front, SIZE, 0, reading)
        victim.expect_end("dirty log is no usable memory")
    os.close(reading)
    os.close(writing)


def test_a_log_that_was_shared_for_reading_only_ends_the_session(victim: Victim) -> None:
    writable = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(writable, SIZE)
    readonly = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    with negotiated(victim) as front:
        send_log(front, SIZE, 0, readonly)
        victim.expect_end("cannot map")
    os.close(readonly)
    os.close(writable)


def test_a_log_too_small_for_the_memory_ends_the_session(victim: Victim, memfd: int) -> None:
    with Session(victim.path) as session:
        send_log(session.front_end, 64, 0, memfd)
        victim.expect_end("the dirty log has room for guest memory up to")


def test_a_log_that_is_truncated_under_writes_ends_its_session(victim: Victim) -> None:
    with Session(victim.path) as session, DirtyLog(session.memory) as log:
        front = session.front_end
        log.send(front)
        front.set_features(front.features | 1 << F_LOG_ALL)
        session.disk.read(0, 4096)
        os.ftruncate(log.fd, 0)
        for _ in range(4):
            session.disk.queue(Kind.IN, 0, room=4096)
        session.disk.publish()
        assert front.hung_up()
        victim.expect_end("its dirty log was truncated while it was in use")


def test_a_log_that_is_the_guests_own_memory_harms_only_itself(victim: Victim) -> None:
    """The marks spoil its own rings, in the end; whatever happens, it happens to this session."""
    with Session(victim.path) as session:
        front, region = session.front_end, session.memory.regions[0]
        front.set_log_base(1 << 18, region.mmap_offset, region.fd)
        front.set_features(front.features | 1 << F_LOG_ALL)
        for _ in range(8):
            session.disk.queue(Kind.IN, 0, room=4096)
        session.disk.publish()
        assert front.get_features()


def test_logs_without_end_are_kept_one_at_a_time(victim: Victim, memfd: int) -> None:
    """The fixtures check that nothing was left behind."""
    with Session(victim.path) as session:
        front = session.front_end
        front.set_features(front.features | 1 << F_LOG_ALL)
        for _ in range(100):
            front.set_log_base(SIZE, 0, memfd)
        assert session.disk.read(0, 4096)
