"""A dirty log as a VM monitor keeps it (vhost-user, "Migration"). Never imports drivebay.

Context: tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tests.fakes.front_end import FrontEnd
from tests.fakes.memory import PAGE, GuestMemory


def pages_of(places: Iterable[tuple[int, int]]) -> set[int]:
    """The pages that (address, length) touch."""
    return {
        page
        for address, length in places
        if length
        for page in range(address // PAGE, (address + length - 1) // PAGE + 1)
    }


class DirtyLog:
    """One memfd with a bit for each page of a guest's memory."""

    def __init__(self, memory: GuestMemory) -> None:
        end = max(region.end for region in memory.regions)
        self.size = (end // PAGE + 63) // 64 * 8
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def send(self, front: FrontEnd) -> None:
        """SET_LOG_BASE; returns when the former log is used no more."""
        front.set_log_base(self.size, 0, self.fd)

    def pages(self) -> set[int]:
        """The marked ones: log[page / 8] has bit page % 8."""
        found = set()
        for at, byte in enumerate(os.pread(self.fd, self.size, 0)):
            if byte:
                found |= {8 * at + bit for bit in range(8) if byte >> bit & 1}
        return found

    def take(self) -> set[int]:
        """The marked ones, which are cleared. Only while nobody marks."""
        found = self.pages()
        os.pwrite(self.fd, bytes(self.size), 0)
        return found
