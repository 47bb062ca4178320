"""Guest memory that cannot be trusted: tables that lie, files of the wrong kind, truncation."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.driver import F_VERSION_1, Kind, Session
from tests.fakes.front_end import FrontEnd, HungUp, Refused, Request, region_bytes
from tests.fakes.memory import APART, PAGE, GuestMemory, GuestRegion, Layout
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.neighbour import Neighbour
from tests.hostile.vhost_user.test_messages import ALL_ONES, drain_to_the_end, negotiated

TOP = ALL_ONES - PAGE + 1
SIZE = 1 << 20


class Told(GuestRegion):
    """A region that is described otherwise than it is."""

    def __init__(self, fd: int, **lies: int) -> None:  # no mapping of ours at all
        self.guest_addr = lies.get("guest_addr", 0x10_0000)
        self.size = lies.get("size", SIZE)
        self.user_addr = lies.get("user_addr", 0x7000_0000_0000)
        self.mmap_offset = lies.get("mmap_offset", 0)
        self.fd = fd


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * SIZE)
    yield fd
    os.close(fd)


TABLES: dict[str, list[dict[str, int]]] = {
    "an empty region": [{"size": 0}],
    "a region behind its file": [{"mmap_offset": 4 * SIZE}],
    "a region over the end of its file": [{"mmap_offset": 4 * SIZE - PAGE, "size": 2 * PAGE}],
    "a size of 2^64-1": [{"size": ALL_ONES}],
    "a size of 2^63": [{"size": 1 << 63}],
    "an offset of 2^64-1": [{"mmap_offset": ALL_ONES}],
    "an offset and size that wrap": [{"mmap_offset": TOP, "size": 2 * PAGE}],
    "an offset and size of exactly 2^64": [{"mmap_offset": TOP, "size": PAGE}],
    "a guest address that wraps": [{"guest_addr": TOP, "size": 2 * PAGE}],
    "a user address that wraps": [{"user_addr": TOP, "size": 2 * PAGE}],
    "one region twice": [{}, {}],
    "overlap for the guest": [{}, {"user_addr": 0x1000, "guest_addr": 0x10_0000 + SIZE - PAGE}],
    "overlap for the front end": [{}, {"guest_addr": 0, "user_addr": 0x7000_0000_0000 + PAGE}],
    "the last of eight is bad": [
        {"guest_addr": n << 24, "user_addr": n << 24, "size": PAGE} for n in range(7)
    ]
    + [{"guest_addr": 7 << 24, "user_addr": 7 << 24, "size": 1 << 40}],
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_lies_ends_the_session(victim: Victim, memfd: int, what: str) -> None:
    with negotiated(victim) as front:
        with pytest.raises((Refused, HungUp)):
            front.set_mem_table([Told(memfd, **lies) for lies in TABLES[what]])
        drain_to_the_end(front)
        victim.expect_end()


@pytest.mark.parametrize("what", [name for name in TABLES if len(TABLES[name]) == 1])
def test_an_added_region_that_lies_ends_the_session(victim: Victim, memfd: int, what: str) -> None:
    with Session(victim.path) as session:
        with pytest.raises((Refused, HungUp)):
            session.front_end.add_mem_reg(Told(memfd, **{"guest_addr": 1 << 40, **TABLES[what][0]}))
        drain_to_the_end(session.front_end)
        victim.expect_end()


def test_an_added_region_over_another_ends_the_session(victim: Victim, memfd: int) -> None:
    with Session(victim.path) as session:
        taken = session.memory.regions[0]
        with pytest.raises((Refused, HungUp)):
            session.front_end.add_mem_reg(Told(memfd, guest_addr=taken.guest_addr + PAGE))
        drain_to_the_end(session.front_end)
        victim.expect_end()


# ---- the file behind it ------------------------------------------------------------------


def file_on_disk(folder: Path) -> int:
    path = folder / "memory"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd


WRONG_KINDS: dict[str, Callable[[Path], int]] = {
    "a pipe": lambda _: os.pipe()[0],
    "an eventfd": lambda _: os.eventfd(0),
    "a socket": lambda _: socket.socket(socket.AF_UNIX).detach(),
    "a folder": lambda folder: os.open(folder, os.O_RDONLY),
    "/dev/zero": lambda _: os.open("/dev/zero", os.O_RDWR),
    "/dev/null": lambda _: os.open("/dev/null", os.O_RDWR),
    "/proc/self/mem": lambda _: os.open("/proc/self/mem", os.O_RDWR),
    "an epoll": lambda _: epoll_fd(),
}


def epoll_fd() -> int:
    poll = select.epoll()
    fd = os.dup(poll.fileno())
    poll.close()
    return fd


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_memory_that_is_no_memory_ends_the_session(
    victim: Victim, tmp_path: Path, kind: str
) -> None:
    fd = WRONG_KINDS[kind](tmp_path)
    with negotiated(victim) as front:
        with pytest.raises((Refused, HungUp)):
            front.set_mem_table([Told(fd)])
        drain_to_the_end(front)
        victim.expect_end()
    os.close(fd)


def disk_folder(tmp_path: Path) -> Path | None:
    """A folder that is on neither tmpfs nor hugetlbfs."""
    for folder in (tmp_path, Path("/var/tmp"), Path(__file__).parent):
        best, kind = "", ""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, this_kind, *_ = line.split()
            inside = folder == Path(where) or Path(where) in folder.parents
            if inside and len(where) >= len(best):
                best, kind = where, this_kind
        if kind not in ("tmpfs", "ramfs", "hugetlbfs"):
            return folder
    return None


def test_memory_on_a_file_system_of_a_disk_is_refused(victim: Victim, tmp_path: Path) -> None:
    """A page fault there can wait for a disk or a network: the reactor would wait with it."""
    folder = disk_folder(tmp_path)
    assert folder is not None, "no folder outside of tmpfs"
    path = folder / f"drivebay-memory-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        path.unlink()
        os.ftruncate(fd, SIZE)
        with negotiated(victim) as front:
            with pytest.raises((Refused, HungUp)):
                front.set_mem_table([Told(fd)])
            drain_to_the_end(front)
            victim.expect_end("memfd")
    finally:
        os.close(fd)


def test_memory_that_we_may_not_write_ends_the_session(victim: Victim, memfd: int) -> None:
    read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    with negotiated(victim) as front:
        with pytest.raises((Refused, HungUp)):
            front.set_mem_table([Told(read_only)])
        drain_to_the_end(front)
        victim.expect_end()
    os.close(read_only)


# ---- truncation under I/O ----------------------------------------------------------------


def queue_some(session: Session) -> None:
    for n in range(8):
        session.disk.queue(Kind.OUT if n % 2 else Kind.IN, 64 * n, *io_of(n))


def busy(session: Session) -> None:
    """Requests in the ring whose answers nobody waits for."""
    queue_some(session)
    session.disk.publish()


def io_of(n: int) -> tuple[bytes, int]:
    return (b"\x5a" * 32768, 0) if n % 2 else (b"", 32768)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["rings", "buffers", "both"])
@pytest.mark.parametrize("round_number", range(3))
def test_memory_truncated_under_io_ends_that_session_only(
    victim: Victim, neighbour: Neighbour, which: int, round_number: int
) -> None:
    layouts = (Layout(0, SIZE), Layout(1 << 32, 4 * SIZE))
    with Session(victim.path, layouts=layouts) as session:
        # All of the first region but the rings is taken, so buffers come from the second.
        for length in (1 << 19, 1 << 18, 1 << 17, 1 << 16, 1 << 15, 1 << 14):
            try:
                session.memory.allocate(length, one_region=True)
            except MemoryError:
                continue
        busy(session)
        session.disk.wait_all()
        busy(session)
        queue_some(session)
        # From here on our own mappings of it must not be touched either.
        for region in session.memory.regions if which == 2 else [session.memory.regions[which]]:
            os.ftruncate(region.fd, 0)
        if which == 1:
            session.disk.publish()
        for _ in range(20):
            session.ports[0].kick()
            neighbour.expect_progress(2)
        drain_to_the_end(session.front_end)
        victim.expect_end("truncated")


def test_memory_truncated_before_it_is_used(victim: Victim) -> None:
    with Session(victim.path) as session:
        for region in session.memory.regions:
            os.ftruncate(region.fd, 0)
        session.ports[0].kick()
        drain_to_the_end(session.front_end)
        victim.expect_end("truncated")


def test_memory_truncated_between_the_table_and_the_start_of_a_ring(victim: Victim) -> None:
    """The first to touch it is then the control plane, which starts the ring."""
    with Session(victim.path, queues=0) as session:
        driver, port = session.prepare_queue(64), session.ports[0]
        for region in session.memory.regions:
            os.ftruncate(region.fd, 0)
        with contextlib.suppress(Refused, HungUp):
            session.front_end.set_vring_num(0, 64)
            session.set_addresses(0, driver.ring)
            session.front_end.set_vring_kick(0, port.kick_fd)
            session.front_end.set_vring_enable(0)
        drain_to_the_end(session.front_end)
        victim.expect_end("truncated")


def test_memory_shrunk_before_it_is_mapped(victim: Victim, memfd: int) -> None:
    os.ftruncate(memfd, PAGE)
    with negotiated(victim) as front:
        with pytest.raises((Refused, HungUp)):
            front.set_mem_table([Told(memfd)])
        drain_to_the_end(front)
        victim.expect_end()


def test_holes_punched_into_memory_read_as_zeroes(victim: Victim) -> None:
    """A balloon does this all day: new pages, and no broken session."""
    with Session(victim.path) as session:
        session.disk.write(0, b"\x01" * 4096)
        addr = session.memory.allocate(64 * PAGE, PAGE, one_region=True)
        session.memory.write(addr, b"\xff" * 64 * PAGE)
        region = session.memory.region_of(addr)
        punch(region.fd, region.mmap_offset + addr - region.guest_addr, 64 * PAGE)
        assert session.memory.read(addr, 64 * PAGE) == bytes(64 * PAGE)
        session.memory.free(addr, 64 * PAGE)
        assert session.disk.read(0, 4096) == b"\x01" * 4096


def punch(fd: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    long = ctypes.c_long
    keep_size_punch_hole = 3
    result = libc.fallocate(fd, keep_size_punch_hole, long(offset), long(length))
    assert result == 0, os.strerror(ctypes.get_errno())


# ---- changing memory while it is in use ----------------------------------------------------


def test_a_region_removed_while_io_is_in_flight(victim: Victim) -> None:
    """The answer comes when nothing in flight uses it; the session itself goes on."""
    layouts = (Layout(0, SIZE), Layout(1 << 32, SIZE))
    for _ in range(5):
        with Session(victim.path, layouts=layouts) as session:
            busy(session)
            session.front_end.rem_mem_reg(session.memory.regions[1])
            assert session.front_end.get_features()


def test_the_region_of_the_rings_removed_while_io_is_in_flight(victim: Victim) -> None:
    for _ in range(5):
        with Session(victim.path) as session:
            busy(session)
            try:
                session.front_end.rem_mem_reg(session.memory.regions[0])
                session.front_end.get_features()
            except (Refused, HungUp):
                victim.expect_end()


def test_a_table_replaced_while_io_is_in_flight(victim: Victim) -> None:
    """Every request is answered, whichever table it was translated with."""
    with Session(victim.path) as session:
        for _ in range(30):
            busy(session)
            session.front_end.set_mem_table(session.memory)
            session.disk.wait_all()


def test_a_table_without_the_rings_while_io_is_in_flight(victim: Victim) -> None:
    with Session(victim.path) as session, GuestMemory((Layout(1 << 40, SIZE),)) as other:
        busy(session)
        other.regions[0].user_addr += 1 << 44
        try:
            session.front_end.set_mem_table(other)
            session.front_end.get_features()
        except (Refused, HungUp):
            victim.expect_end()


def test_a_table_of_no_regions_takes_all_memory_away_until_there_is_some(victim: Victim) -> None:
    with Session(victim.path) as session:
        session.disk.write(0, b"\x01" * 512)
        busy(session)
        session.front_end.set_mem_table([])
        assert session.front_end.get_features()
        session.front_end.set_mem_table(session.memory)
        session.disk.wait_all()
        session.disk.read(0, 512)


def test_as_many_slots_as_there_are_and_one_more(victim: Victim) -> None:
    with negotiated(victim) as front:
        slots = front.get_max_mem_slots()
        assert slots >= len(APART)
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE)
        for n in range(slots):
            where = {"guest_addr": n << 24, "user_addr": (n + 1) << 24, "size": PAGE}
            front.add_mem_reg(Told(fd, **where))
        with pytest.raises((Refused, HungUp)):
            front.add_mem_reg(Told(fd, guest_addr=1 << 50, user_addr=1 << 50, size=PAGE))
        drain_to_the_end(front)
        victim.expect_end()
        os.close(fd)


def test_slots_come_and_go_a_thousand_times(victim: Victim, memfd: int) -> None:
    with negotiated(victim) as front:
        region = Told(memfd)
        for _ in range(1000):
            front.add_mem_reg(region)
            front.rem_mem_reg(region)
        assert front.features >> F_VERSION_1 & 1


def test_a_region_is_removed_only_by_its_exact_place(victim: Victim, memfd: int) -> None:
    for lie in ({"size": 2 * SIZE}, {"guest_addr": 0}, {"user_addr": 0x1000}):
        with negotiated(victim) as front:
            front.add_mem_reg(Told(memfd))
            with pytest.raises((Refused, HungUp)):
                front.rem_mem_reg(Told(memfd, **lie))


def test_a_descriptor_that_comes_with_rem_mem_reg_is_closed(victim: Victim, memfd: int) -> None:
    """Older front ends send one; it is surplus."""
    with negotiated(victim) as front:
        region = Told(memfd)
        for _ in range(20):
            front.add_mem_reg(region)
            front.tell(Request.REM_MEM_REG, bytes(8) + region_bytes(region), [memfd])
        assert isinstance(front, FrontEnd)
