"""The dirty log: which bits a write sets, where the log ends, and what is refused as one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.errors import PeerError
from drivebay.memory.guest_memory import MemoryTable, Region, mapped_regions

PAGE = 4096
MIB = 1 << 20
END = 1 << 64


class Log:
    """A log as a front end has it, and the same one mapped as the target maps it."""

    def __init__(self, size: int, *, before: int = 0, behind: int = 0) -> None:
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, before + size + behind)
        self._before = before
        self._size = size
        self.mapped = DirtyLog(self.fd, before, size)

    def pages(self) -> set[int]:
        """The pages marked, counted from the log's start; nothing else was touched."""
        content = os.pread(self.fd, self._before + self._size + MIB, 0)
        assert not any(content[: self._before]), "written before the log's start"
        assert not any(content[self._before + self._size :]), "written behind the log's end"
        bits = int.from_bytes(content[self._before : self._before + self._size], "little")
        return {page for page in range(self._size * 8) if bits >> page & 1}

    def close(self) -> None:
        self.mapped.release()
        os.close(self.fd)


@contextmanager
def log_of(size: int, *, before: int = 0, behind: int = 0) -> Iterator[Log]:
    with closing(Log(size, before=before, behind=behind)) as log:
        yield log


@pytest.fixture(autouse=True)
def _nothing_stays_mapped() -> Iterator[None]:
    before = mapped_regions()
    yield
    assert mapped_regions() == before


@pytest.mark.parametrize(
    ("address", "length", "first", "count"),
    [
        (0, 1, 0, 1),
        (PAGE - 1, 1, 0, 1),
        (PAGE - 1, 2, 0, 2),
        (PAGE, PAGE, 1, 1),
        (5 * PAGE + 7, 3 * PAGE, 5, 4),
        (63 * PAGE, 2 * PAGE, 63, 2),
        (64 * PAGE, 64 * PAGE, 64, 64),
        (1, 300 * PAGE, 0, 301),
        (511 * PAGE, PAGE, 511, 1),
    ],
)
def test_each_page_that_was_touched_is_marked_and_no_other(
    address: int, length: int, first: int, count: int
) -> None:
    with log_of(64) as log:
        log.mapped.mark(address, length)
        assert log.pages() == set(range(first, first + count))


def test_bits_have_the_order_of_the_specification() -> None:
    """vhost-user "Migration": log[page / 8] |= 1 << page % 8."""
    with log_of(64) as log:
        for page in (0, 9, 77):
            log.mapped.mark(page * PAGE, 1)
        content = os.pread(log.fd, 64, 0)
        assert (content[0], content[1], content[9]) == (1, 2, 32)


def test_no_bytes_mark_nothing() -> None:
    with log_of(64) as log:
        log.mapped.mark(PAGE, 0)
        assert log.pages() == set()


def test_marks_stay_when_others_are_set() -> None:
    with log_of(64) as log:
        log.mapped.mark(3 * PAGE, 1)
        log.mapped.mark(70 * PAGE, PAGE)
        log.mapped.mark(3 * PAGE, 1)
        assert log.pages() == {3, 70}


@pytest.mark.parametrize(
    ("address", "length", "marked"),
    [
        (512 * PAGE, PAGE, set()),
        (511 * PAGE, 2 * PAGE, {511}),
        (510 * PAGE, END - 1 - 510 * PAGE, {510, 511}),
        (511 * PAGE, END - 1, {511}),
        (END - 1, 1, set()),
        (END - 1, END - 1, set()),
        (END - PAGE, PAGE, set()),
    ],
    ids=["behind", "across", "to the last address", "wraps", "last byte", "all", "last page"],
)
def test_nothing_is_written_behind_the_end(address: int, length: int, marked: set[int]) -> None:
    """CVE-2020-10722: an address and a length from outside never lead out of the log."""
    with log_of(64, before=4096 - 64, behind=4096) as log:
        log.mapped.mark(address, length)
        assert log.pages() == marked


@pytest.mark.parametrize("size", [1, 7, 13, 4096 + 3])
@pytest.mark.parametrize("behind", [0, MIB])
def test_a_log_may_end_within_a_word(size: int, behind: int) -> None:
    with log_of(size, behind=behind) as log:
        assert log.mapped.covers == size * 8 * PAGE
        log.mapped.mark(0, (size * 8 + 64) * PAGE)
        assert log.pages() == set(range(size * 8))


def test_a_log_may_begin_within_its_file() -> None:
    with log_of(64, before=3 * PAGE + 8) as log:
        log.mapped.mark(17 * PAGE, 1)
        assert log.pages() == {17}


def test_two_threads_lose_no_bit() -> None:
    """Neighbouring bits of the same words, set from two threads without the GIL at once."""
    with log_of(4096) as log:

        def mark(odd: int) -> None:
            for page in range(odd, 32768, 2):
                log.mapped.mark(page * PAGE, 1)

        threads = [threading.Thread(target=mark, args=(odd,)) for odd in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(log.pages()) == 32768


@contextmanager
def memory(*places: tuple[int, int, int]) -> Iterator[MemoryTable]:
    """Regions of (guest address, size, offset) of one file, at scattered addresses."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * MIB)
    table = MemoryTable(
        [Region(guest, size, 0x1000_0000 + guest, offset, fd) for guest, size, offset in places]
    )
    os.close(fd)
    try:
        yield table
    finally:
        table.release()


def test_buffers_are_marked_at_their_guest_addresses() -> None:
    with memory((0, MIB, 0), (16 * MIB, MIB, MIB)) as table, log_of(1024) as log:
        log.mapped.mark_buffers(
            table, [(16 * MIB + 5, 10), (2 * PAGE, 2 * PAGE), (MIB - 1, 1)], 10 + 2 * PAGE + 1
        )
        assert log.pages() == {2, 3, 255, 4096}


def test_of_the_buffers_only_what_was_written_is_marked() -> None:
    with memory((0, MIB, 0)) as table, log_of(1024) as log:
        log.mapped.mark_buffers(table, [(0, PAGE), (4 * PAGE, 4 * PAGE)], 2 * PAGE + 1)
        assert log.pages() == {0, 4, 5}
        log.mapped.mark_buffers(table, [(9 * PAGE, PAGE)], 0)
        assert log.pages() == {0, 4, 5}


def test_buffers_behind_the_log_are_left_out() -> None:
    with memory((0, MIB, 0), (16 * MIB, MIB, MIB)) as table, log_of(32, behind=MIB) as log:
        log.mapped.mark_buffers(table, [(16 * MIB, PAGE), (0, PAGE)], 2 * PAGE)
        assert log.pages() == {0}


def test_memory_that_was_switched_is_found_by_the_table_it_was_translated_with() -> None:
    """The same host addresses, shown to the guest elsewhere by the next table."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    before = MemoryTable([Region(0, MIB, 0x1000_0000, 0, fd)])
    after = MemoryTable([Region(4 * MIB, MIB, 0x2000_0000, 0, fd)], before)
    os.close(fd)
    with log_of(1024) as log:
        log.mapped.mark_buffers(before, [(PAGE, 1)], 1)
        assert log.pages() == {1}
        log.mapped.mark_buffers(after, [(4 * MIB + PAGE, 1)], 1)
        assert log.pages() == {1, 1025}
    before.release()
    after.release()


@pytest.mark.parametrize(
    ("offset", "size", "says"),
    [
        (0, 0, "a dirty log of 0 bytes"),
        (4, 64, "offset 0x4"),
        (0, 4097, "ends at byte 4097 of its file, which has 4096"),
        (4096, 8, "ends at byte 4104 of its file, which has 4096"),
        (END - 8, 8, "wraps"),
        (END - 8, 64, "wraps"),
        (64, END - 64, "wraps"),
        (0, END - 8, "ends at byte"),
    ],
)
def test_a_log_that_does_not_fit_its_file_is_refused(offset: int, size: int, says: str) -> None:
    """CVE-2020-10722: offset plus size that wraps, or ends behind the file."""
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    with pytest.raises(PeerError, match=says):
        DirtyLog(fd, offset, size)
    os.close(fd)


def test_a_log_that_is_no_memory_is_refused() -> None:
    reading, writing = os.pipe()
    with pytest.raises(PeerError, match="dirty log is no usable memory"):
        DirtyLog(reading, 0, 64)
    os.close(reading)
    os.close(writing)


def test_after_its_release_nothing_is_marked() -> None:
    with log_of(64) as log:
        log.mapped.release()
        log.mapped.mark(0, PAGE)
        assert log.pages() == set()


def test_a_truncated_log_is_survived_and_reported() -> None:
    """A process of its own: a signal's action belongs to the whole process."""
    script = textwrap.dedent("""
        import os
        from drivebay.dataplane.dirty_log import DirtyLog
        from drivebay.memory.guest_memory import install_sigbus_handler
        from drivebay.reactor.mailbox import ControlMailbox
        install_sigbus_handler()
        control = ControlMailbox()
        fd = os.memfd_create("log")
        os.ftruncate(fd, 65536)
        heard = []
        log = DirtyLog(fd, 0, 65536, lambda: heard.append("broken"))
        os.ftruncate(fd, 0)
        log.mark(0, 1 << 30)
        control.drain()
        assert heard == ["broken"]
        log.release()
        print("reached the end")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout == "reached the end\n"
