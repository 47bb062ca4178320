"""The table of a guest's memory: what it maps, what it refuses, what it gives back.

Faults by truncation are in test_guest_memory_faults.py: they need a process of their own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, PeerError, StateError
from drivebay.memory.guest_memory import MemoryTable, Region, mapped_regions
from tests.fakes.descriptors import held_fds

PAGE = 4096
MIB = 1 << 20
USER = 0x7F00_0000_0000
REGIONS_MAX = 32


@contextmanager
def file_of(size: int) -> Iterator[int]:
    """A memfd, as a VM monitor makes it."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def fd() -> Iterator[int]:
    with file_of(4 * MIB) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_stays_mapped() -> Iterator[None]:
    before = mapped_regions()
    yield
    assert mapped_regions() == before, "a table of this test is still mapped"


def region(
    fd: int, guest: int = 0, size: int = MIB, *, user: int | None = None, offset: int = 0
) -> Region:
    return Region(guest, size, USER + guest if user is None else user, offset, fd)


@contextmanager
def table_of(*regions: Region, previous: MemoryTable | None = None) -> Iterator[MemoryTable]:
    table = MemoryTable(regions, previous)
    try:
        yield table
    finally:
        table.release()


# ---- what is mapped -------------------------------------------------------------------------


def test_a_table_reads_and_writes_the_file_behind_it(fd: int) -> None:
    os.pwrite(fd, b"before", 2 * PAGE + 8)
    with table_of(region(fd, guest=1 << 32, offset=PAGE)) as table:
        assert table.read((1 << 32) + PAGE + 8, 6) == b"before"
        table.write((1 << 32) + 3, b"after")
        assert table.read((1 << 32) + 3, 0) == b""
    assert os.pread(fd, 5, PAGE + 3) == b"after"


def test_a_region_may_begin_in_the_middle_of_a_page(fd: int) -> None:
    os.pwrite(fd, b"odd", 100)
    with table_of(region(fd, size=PAGE, offset=100)) as table:
        assert table.read(0, 3) == b"odd"
        table.write(PAGE - 1, b"\xaa")
    assert os.pread(fd, 1, 100 + PAGE - 1) == b"\xaa"


def test_a_copy_goes_over_the_border_of_two_regions(fd: int) -> None:
    """Neighbours for the guest, far apart and in the other order in the file."""
    low = region(fd, guest=0, size=PAGE, offset=MIB)
    high = region(fd, guest=PAGE, size=PAGE, offset=0)
    with table_of(low, high) as table:
        table.write(PAGE - 3, b"abcdef")
        assert table.read(PAGE - 3, 6) == b"abcdef"
    assert os.pread(fd, 3, MIB + PAGE - 3) == b"abc"
    assert os.pread(fd, 3, 0) == b"def"


@pytest.mark.parametrize("address", [MIB, MIB - 1, 2 * MIB, (1 << 64) - 1])
def test_a_copy_outside_memory_is_refused(fd: int, address: int) -> None:
    with table_of(region(fd)) as table:
        with pytest.raises(PeerError, match=f"{address:#x}"):
            table.read(address, 2)
        with pytest.raises(PeerError, match=f"{address:#x}"):
            table.write(address, b"xx")


def test_a_user_address_is_found_and_must_lie_in_one_region(fd: int) -> None:
    first = region(fd, guest=0, user=USER, size=PAGE)
    second = region(fd, guest=PAGE, user=USER + PAGE, size=PAGE, offset=PAGE)
    with table_of(first, second) as table:
        base = table.resolve_user(USER, PAGE, "ring")
        assert table.resolve_user(USER + 16, PAGE - 16, "ring") == base + 16
        for address, length in [(USER + PAGE - 1, 2), (USER - 1, 1), (USER, PAGE + 1), (0, 1)]:
            with pytest.raises(PeerError, match="used ring of queue 3"):
                table.resolve_user(address, length, "used ring of queue 3")


def test_32_regions_fit_and_33_do_not(fd: int) -> None:
    regions = [
        region(fd, guest=i * PAGE, size=PAGE, offset=i * PAGE) for i in range(REGIONS_MAX + 1)
    ]
    with table_of(*regions[:REGIONS_MAX]) as table:
        assert mapped_regions() >= REGIONS_MAX
        table.write(0, bytes(range(256)) * (REGIONS_MAX * PAGE // 256))
        assert table.read((REGIONS_MAX - 1) * PAGE + 7, 1) == b"\x07"
    with pytest.raises(PeerError, match="33 memory regions"):
        MemoryTable(regions)


# ---- what is refused ------------------------------------------------------------------------

BAD_PAIRS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    # (guest, user) of two regions of 1 MiB
    "the same twice": ((0, USER), (0, USER)),
    "guest addresses overlap by a byte": ((0, USER), (MIB - 1, USER + 4 * MIB)),
    "one inside the other": ((MIB, USER), (MIB + PAGE, USER + 4 * MIB)),
    "user addresses overlap by a byte": ((0, USER), (4 * MIB, USER + MIB - 1)),
    "user addresses overlap from below": ((0, USER), (4 * MIB, USER - 1)),
}


@pytest.mark.parametrize("which", BAD_PAIRS)
def test_overlapping_regions_are_refused(fd: int, which: str) -> None:
    (guest, user), (other_guest, other_user) = BAD_PAIRS[which]
    with pytest.raises(PeerError, match="overlaps"):
        MemoryTable([region(fd, guest, user=user), region(fd, other_guest, user=other_user)])


def test_regions_that_touch_do_not_overlap(fd: int) -> None:
    with table_of(region(fd, MIB), region(fd, 0), region(fd, 2 * MIB)) as table:
        assert len(table.regions) == 3


WRAPS = {
    "guest address": Region((1 << 64) - PAGE, 2 * PAGE, USER, 0, -1),
    "user address": Region(0, 2 * PAGE, (1 << 64) - PAGE, 0, -1),
    "mmap offset": Region(0, 2 * PAGE, USER, (1 << 64) - PAGE, -1),
}


@pytest.mark.parametrize("what", WRAPS)
def test_an_address_that_wraps_is_refused(fd: int, what: str) -> None:
    with pytest.raises(PeerError, match=rf"{what} 0xf+000 .*wraps"):
        MemoryTable([WRAPS[what]._replace(fd=fd)])


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 4 * MIB + 1), (4 * MIB, PAGE), (4 * MIB - PAGE, PAGE + 1), (1 << 62, 1)],
)
def test_a_region_that_ends_behind_its_file_is_refused(fd: int, offset: int, size: int) -> None:
    with pytest.raises(PeerError, match=f"ends at byte {offset + size} of its file"):
        MemoryTable([region(fd, size=size, offset=offset)])


def test_the_last_byte_of_the_file_may_be_mapped(fd: int) -> None:
    with table_of(region(fd, size=4 * MIB)) as table:
        table.write(4 * MIB - 1, b"z")
    assert os.pread(fd, 1, 4 * MIB - 1) == b"z"


def test_empty_things_are_refused(fd: int) -> None:
    with pytest.raises(PeerError, match="without regions"):
        MemoryTable([])
    with pytest.raises(PeerError, match="is empty"):
        MemoryTable([region(fd, size=0)])


def test_a_file_on_a_disk_is_refused(disk_folder: Path) -> None:
    """A page fault on it could stop everybody's disks."""
    path = disk_folder / "memory"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(PeerError, match="memfd, tmpfs and hugetlbfs") as refused:
            MemoryTable([region(fd)])
        assert "memory-backend-memfd" in (refused.value.hint or "")
    finally:
        os.close(fd)


def test_what_is_no_file_at_all_is_refused() -> None:
    reading, writing = os.pipe()
    event = os.eventfd(0)
    try:
        for fd in (reading, event):
            with pytest.raises(DrivebayError):
                MemoryTable([region(fd)])
        os.close(event)
        with pytest.raises(HostError):
            MemoryTable([region(event)])
    finally:
        os.close(reading)
        os.close(writing)


def test_memory_that_may_not_be_written_is_refused() -> None:
    with file_of(MIB) as writable:
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(HostError, match="cannot map"):
            MemoryTable([region(writable)])
        fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
        try:
            with pytest.raises(HostError, match="cannot map"):
                MemoryTable([region(fd)])
        finally:
            os.close(fd)


def test_a_refused_table_leaves_nothing_mapped(fd: int) -> None:
    """The second region is bad, the first was mapped already."""
    before = mapped_regions()
    with pytest.raises(PeerError):
        MemoryTable([region(fd), region(fd, guest=MIB, size=8 * MIB)])
    assert mapped_regions() == before


# ---- from one table to the next -------------------------------------------------------------


def test_what_is_unchanged_keeps_its_mapping(fd: int) -> None:
    """So that a VM monitor that adds memory does not cost the old a page fault each."""
    before = mapped_regions()
    first = region(fd, guest=0)
    with table_of(first) as old:
        address = old.resolve_user(USER, 1, "x")
        more = region(fd, guest=MIB, offset=MIB)
        with table_of(first, more, previous=old) as new:
            assert mapped_regions() == before + 2
            assert new.resolve_user(USER, 1, "x") == address
            assert new.generation > old.generation
            old.release()
            assert mapped_regions() == before + 2
            new.write(0, b"still here")
            assert new.read(0, 10) == b"still here"
    assert mapped_regions() == before


def test_the_same_memory_at_another_guest_address_keeps_its_mapping(fd: int) -> None:
    with table_of(region(fd, guest=0, user=USER)) as old:
        moved = region(fd, guest=MIB, user=USER + 8 * MIB)
        with table_of(moved, previous=old) as new:
            host = old.resolve_user(USER, 1, "x")
            assert new.resolve_user(USER + 8 * MIB, 1, "x") == host
            with pytest.raises(PeerError):
                new.read(0, 1)


def test_another_file_or_place_gets_a_mapping_of_its_own(fd: int) -> None:
    before = mapped_regions()
    with file_of(4 * MIB) as other, table_of(region(fd)) as old:
        for changed in (
            region(other),
            region(fd, offset=MIB),
            region(fd, size=2 * MIB),
        ):
            with table_of(changed, previous=old) as new:
                assert mapped_regions() == before + 2
                assert new.resolve_user(USER, 1, "x") != old.resolve_user(USER, 1, "x")


def test_a_region_without_a_descriptor_is_one_of_the_previous_table(fd: int) -> None:
    with table_of(region(fd), region(fd, guest=MIB, offset=MIB)) as old:
        kept = region(-1, guest=MIB, offset=MIB)
        with table_of(kept, previous=old) as new:
            host = old.resolve_user(USER + MIB, 1, "x")
            assert new.resolve_user(USER + MIB, 1, "x") == host
        for unknown in (region(-1, guest=2 * MIB), kept._replace(size=2 * MIB)):
            with pytest.raises(PeerError, match="without a descriptor"):
                MemoryTable([unknown], old)
    with pytest.raises(PeerError, match="without a descriptor"):
        MemoryTable([region(-1)])


def test_a_released_table_lends_nothing(fd: int) -> None:
    table = MemoryTable([region(fd)])
    table.release()
    table.release()
    for use in (
        lambda: table.read(0, 1),
        lambda: table.write(0, b"x"),
        lambda: table.resolve_user(USER, 1, "x"),
    ):
        with pytest.raises(StateError, match="released"):
            use()
    with pytest.raises(PeerError, match="without a descriptor"):
        MemoryTable([region(-1)], table)
    with table_of(region(fd), previous=table) as fresh:
        assert fresh.read(0, 4) == bytes(4)


def test_a_thousand_rounds_leak_neither_mapping_nor_descriptor(fd: int) -> None:
    def lines_in_maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:guest")

    before = mapped_regions(), held_fds(), lines_in_maps()
    table = MemoryTable([region(fd)])
    for i in range(1000):
        extra = region(fd, guest=MIB * (1 + i % 3), size=PAGE, offset=PAGE * (i % 7))
        following = MemoryTable([region(fd), extra], table)
        table.release()
        table = following
        if i % 10 == 0:
            with pytest.raises(PeerError):
                MemoryTable([region(fd), region(fd)], table)
    table.release()
    assert (mapped_regions(), held_fds(), lines_in_maps()) == before


def test_a_table_may_be_built_while_another_thread_releases_its_previous_one(fd: int) -> None:
    """Control builds tables in worker threads: a session may end meanwhile."""
    small = [region(fd, guest=i * PAGE, size=PAGE, offset=i * PAGE) for i in range(8)]
    for _ in range(200):
        previous = MemoryTable(small)
        # New regions behind the kept ones: mapping them gives the other thread its chance.
        fresh = [r._replace(mmap_offset=r.mmap_offset + MIB) for r in small]
        fresh = [
            r._replace(guest_addr=r.guest_addr + MIB, user_addr=USER + MIB + r.guest_addr)
            for r in fresh
        ]
        start = threading.Barrier(2)

        def release(table: MemoryTable = previous, start: threading.Barrier = start) -> None:
            start.wait()
            table.release()

        other = threading.Thread(target=release)
        other.start()
        start.wait()
        table = MemoryTable([*small, *fresh], previous)
        other.join()
        # Had the kept mappings gone, this would be a segmentation fault.
        for i in range(8):
            table.write(i * PAGE, b"alive")
        table.release()


# ---- huge pages -----------------------------------------------------------------------------


def test_hugetlbfs_memory_is_mapped_and_given_back(
    huge_pages: Callable[[int], AbstractContextManager[None]],
) -> None:
    huge = 2 * MIB
    with huge_pages(2):
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        try:
            os.ftruncate(fd, 2 * huge)
            with table_of(
                region(fd, guest=0, size=MIB, offset=PAGE),
                region(fd, guest=4 * MIB, size=huge, offset=huge),
            ) as table:
                table.write(MIB - 4, b"tail")
                table.write(4 * MIB, b"second")
            with mmap.mmap(fd, 2 * huge) as whole:
                assert whole[PAGE + MIB - 4 : PAGE + MIB] == b"tail"
                assert whole[huge : huge + 6] == b"second"
        finally:
            os.close(fd)
