"""What a front end shares beside the guest's memory: a dirty log, and an inflight region.

Both are files of which a part is told, with noise around it that must not change.
"""

from __future__ import annotations

import mmap
import os
import random

from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.dataplane.inflight import InflightRegion, inflight_queue_bytes
from fuzz.choices import Choices
from fuzz.guest import Guest

__all__ = ["InflightFile", "LogFile", "SharedFile"]

PAGE_BITS = 12
LOG_BYTES = 0x24000  # a bit for each page up to 4.5 GiB: both regions of the first layout
NOISE = random.Random(1).randbytes(0x40000)


class SharedFile:
    """A memfd, mapped here, as noise with a hole of zeroes in it."""

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.bytes = memoryview(self._map)
        self.start, self.end = 0, 0

    def tell(self, start: int, length: int) -> None:
        """That part is zeroes and the device's; the rest is nobody's."""
        self.start, self.end = min(start, self.size), min(start + length, self.size)
        self.bytes[:] = NOISE[: self.size]
        self.bytes[self.start : self.end] = bytes(self.end - self.start)

    def expect_unchanged_outside(self) -> None:
        for part in (slice(0, self.start), slice(self.end, self.size)):
            if self.bytes[part] != NOISE[part]:
                raise AssertionError(f"memory around the shared part at {self.start:#x} changed")

    def close(self) -> None:
        self.bytes.release()
        self._map.close()
        os.close(self.fd)


class LogFile(SharedFile):
    """A dirty log of a size and at a place that may be odd."""

    def __init__(self) -> None:
        super().__init__("fuzzed-log", LOG_BYTES + 0x4000)

    def make(self, choices: Choices) -> DirtyLog:
        """Raises: PeerError."""
        offset = choices.pick((0, 0x1000, 0x1000, 64, choices.number(2)))
        size = choices.pick((LOG_BYTES, LOG_BYTES, 0x1000, 8, 1, choices.number(2)))
        if choices.rarely(12):
            offset, size = choices.number(8), choices.number(8)
        self.tell(offset, size)
        return DirtyLog(self.fd, offset, size)

    def marked(self, page: int, log: DirtyLog) -> bool:
        """Whether the page is marked, or beyond what the log has bits for."""
        if page << PAGE_BITS >= log.covers:
            return True
        return bool(self.bytes[self.start + page // 8] >> page % 8 & 1)

    def expect_marked(self, guest: Guest, changed: list[int], log: DirtyLog) -> None:
        """``changed`` are offsets in the guest's file."""
        for at in changed:
            pages = [
                (piece.guest_addr + at - piece.offset) >> PAGE_BITS
                for piece in guest.pieces
                if piece.offset <= at < piece.offset + piece.size
            ]
            if pages and not any(self.marked(page, log) for page in pages):
                raise AssertionError(f"pages {pages} changed and are not marked in the dirty log")


class InflightFile(SharedFile):
    """An inflight region of one queue, new or full of nonsense."""

    def __init__(self) -> None:
        super().__init__("fuzzed-inflight", 0x20000)

    def make(self, choices: Choices, size: int, packed: bool) -> InflightRegion:
        """Raises: PeerError."""
        needed = inflight_queue_bytes(size, packed)
        offset = choices.pick((0, 0x1000, 0x1000, 0x2000, 64))
        length = choices.pick((needed, needed, 2 * needed, needed + 64, needed - 1))
        entries = choices.pick((size, size, size, 2 * size, size // 2, 0, choices.number(2)))
        self.tell(offset, length)
        return InflightRegion(
            fd=self.fd,
            mmap_size=length,
            mmap_offset=offset,
            num_queues=1,
            queue_size=entries,
            packed=packed,
        )

    def scramble(self, choices: Choices) -> None:
        """Anything anywhere in it, mostly in the words at its beginning."""
        for _ in range(1 + choices.below(8)):
            reach = choices.pick((24, 64, 256, self.end - self.start))
            at = self.start + choices.number(2) % max(min(reach, self.end - self.start), 1)
            if at < self.end:
                self.bytes[at] = choices.pick((0, 1, 2, 0xFF, choices.number(1)))
