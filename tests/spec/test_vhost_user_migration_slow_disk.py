"""vhost-user, "Migration": a mark comes after the write, however long the disk takes.

The disk is a FUSE file whose answers the test holds back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.dirty_log import DirtyLog, pages_of
from tests.fakes.driver import Kind, Pending, Session, Status
from tests.fakes.front_end import F_LOG_ALL
from tests.fakes.fuse import FuseFile
from tests.fakes.memory import APART, MIB
from tests.fakes.process import TargetProcess, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_uring]

BLOCK = 4096
READS = 4


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FuseFile]:
    with FuseFile(tmp_path / "backend", b"\x5a" * (4 * MIB)) as backend:
        yield backend
        backend.release()


@pytest.fixture
def controller(backend: FuseFile, tmp_path: Path) -> Iterator[Path]:
    target = TargetProcess(tmp_path)
    try:
        target.rpc("bdev_aio_create", name="Slow0", filename=str(backend.path), block_size=512)
        yield target.controller("slow", "Slow0")
        backend.release()
        assert target.stop() == 0, target.log()[-4000:]
    finally:
        target.kill()


@contextmanager
def with_reads_under_way(
    controller: Path, backend: FuseFile
) -> Iterator[tuple[Session, DirtyLog, list[Pending]]]:
    """A session that logs, and reads that have reached the disk and got no answer."""
    with Session(controller) as session, DirtyLog(session.memory) as log:
        session.memory.keep_below(APART[1].guest_addr)
        log.send(session.front_end)
        session.front_end.set_features(session.front_end.features | 1 << F_LOG_ALL)
        backend.hold()
        reads = [session.disk.queue(Kind.IN, 8 * n, room=BLOCK) for n in range(READS)]
        session.disk.publish()
        wait_until(lambda: backend.held == READS, "all reads are at the disk")
        yield session, log, reads


def written_by(reads: list[Pending]) -> set[int]:
    return pages_of((s.addr, s.length) for read in reads for s in read.writable)


def test_a_mark_comes_after_the_write(controller: Path, backend: FuseFile) -> None:
    """A bit that is cleared before the write would be the last that anybody hears of it."""
    with with_reads_under_way(controller, backend) as (session, log, reads):
        assert log.pages() == set()
        backend.release()
        assert [session.disk.wait(read).status for read in reads] == [Status.OK] * READS
        assert log.pages() == written_by(reads)


def test_what_was_under_way_when_the_log_changed_is_in_the_new_one(
    controller: Path, backend: FuseFile
) -> None:
    with (
        with_reads_under_way(controller, backend) as (session, former, reads),
        DirtyLog(session.memory) as log,
    ):
        log.send(session.front_end)
        backend.release()
        session.disk.wait_all()
        assert former.pages() == set()
        assert log.pages() == written_by(reads)


def test_logging_that_begins_meanwhile_covers_what_is_under_way(
    controller: Path, backend: FuseFile
) -> None:
    with with_reads_under_way(controller, backend) as (session, log, reads):
        front = session.front_end
        front.set_features(front.features & ~(1 << F_LOG_ALL))
        front.set_features(front.features | 1 << F_LOG_ALL)
        backend.release()
        session.disk.wait_all()
        assert log.pages() == written_by(reads)


def test_a_stop_is_answered_when_all_is_written_and_marked(
    controller: Path, backend: FuseFile
) -> None:
    with with_reads_under_way(controller, backend) as (session, log, reads):
        stop = threading.Thread(target=session.front_end.get_vring_base, args=(0,))
        stop.start()
        stop.join(0.3)
        assert stop.is_alive(), "answered while requests were under way"
        assert log.pages() == set()
        backend.release()
        stop.join()
        assert log.pages() == written_by(reads)
        session.disk.collect()
        assert all(read.completion and read.completion.status == Status.OK for read in reads)


def test_what_was_under_way_when_memory_moved_is_marked_where_it_was(
    controller: Path, backend: FuseFile
) -> None:
    """The guest sees the buffers at other addresses now; what was read went to the old ones."""
    with with_reads_under_way(controller, backend) as (session, log, reads):
        low, high = session.memory.regions
        marked = written_by(reads)
        before = high.guest_addr
        high.guest_addr += high.size
        with DirtyLog(session.memory) as larger:
            larger.send(session.front_end)
            switch = threading.Thread(target=session.front_end.set_mem_table, args=([low, high],))
            switch.start()
            switch.join(0.3)
            assert switch.is_alive(), "answered while the old memory was in use"
            backend.release()
            switch.join()
            assert larger.pages() == marked
        high.guest_addr = before
        assert log.pages() == set()
