"""The device's side of a split virtqueue, in Python: what a driver under test talks to.

Written from virtio 1.3 §2.7 and not from our headers, like the driver beside it.
It serves a disk in memory, and can be told to misbehave.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from mmap import mmap
from typing import NamedTuple

_DESC = struct.Struct("<QIHH")
_NEXT, _WRITE = 1, 2
IN, OUT, FLUSH = 0, 1, 4
OK, IOERR, UNSUPP = 0, 1, 2


class Buffer(NamedTuple):
    """One descriptor, as an offset into the shared memory."""

    offset: int
    length: int
    writable: bool


class Device:
    """Serves one queue that lies in ``memory`` at the given offsets."""

    def __init__(
        self, memory: mmap, base: int, size: int, desc: int, avail: int, used: int, disk: bytearray
    ) -> None:
        self.memory = memory
        # struct.pack_into clears the bytes before it writes them, which the driver would
        # see; an element of a view is stored at once.
        self._words = memoryview(memory).cast("H")
        self.base = base
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.disk = disk
        self.next_avail = 0
        self.used_idx = 0
        # Faults: what a request's data become, and whether it is done at all.
        self.damage: Callable[[int, bytearray], None] | None = None
        self.status: Callable[[int, int], int] | None = None

    def u16(self, offset: int) -> int:
        return self._words[offset // 2]

    def set_u16(self, offset: int, value: int) -> None:
        self._words[offset // 2] = value & 0xFFFF

    def chain(self, head: int) -> list[Buffer]:
        buffers = []
        while True:
            address, length, flags, head_next = _DESC.unpack_from(
                self.memory, self.desc + 16 * head
            )
            buffers.append(Buffer(address - self.base, length, bool(flags & _WRITE)))
            assert len(buffers) <= self.size, "the chain loops"
            if not flags & _NEXT:
                return buffers
            head = head_next

    def waiting(self) -> list[int]:
        """Heads that the driver has published and nobody has taken."""
        heads = []
        while self.next_avail != self.u16(self.avail + 2):
            heads.append(self.u16(self.avail + 4 + 2 * (self.next_avail % self.size)))
            self.next_avail = (self.next_avail + 1) & 0xFFFF
        return heads

    def complete(self, head: int, length: int = 0) -> None:
        at = self.used + 4 + 8 * (self.used_idx % self.size)
        struct.pack_into("<II", self.memory, at, head, length)
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.set_u16(self.used + 2, self.used_idx)

    def serve(self) -> int:
        """Execute all that waits; returns how many."""
        heads = self.waiting()
        for head in heads:
            self.complete(head, self.execute(head))
        return len(heads)

    def execute(self, head: int) -> int:
        header, *data, status = self.chain(head)
        assert header.length == 16
        assert not header.writable
        assert status.length == 1
        assert status.writable
        assert self.memory[status.offset] == 0xFF, "the status was not preset"
        kind, _, sector = struct.unpack_from("<IIQ", self.memory, header.offset)
        answer = self.status(kind, sector) if self.status else OK
        if answer == OK and kind != FLUSH:
            self._transfer(kind, sector * 512, data)
        self.memory[status.offset] = answer
        return 1

    def _transfer(self, kind: int, at: int, data: list[Buffer]) -> None:
        for buffer in data:
            assert buffer.writable == (kind == IN)
            there = slice(at, at + buffer.length)
            here = slice(buffer.offset, buffer.offset + buffer.length)
            if kind == IN:
                content = bytearray(self.disk[there])
                if self.damage:
                    self.damage(at, content)
                self.memory[here] = bytes(content)
            else:
                self.disk[there] = self.memory[here]
            at += buffer.length


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
