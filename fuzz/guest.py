"""A guest's memory between canaries: a file of which a session is only told some parts.

The whole file is mapped here and filled with noise. What lies outside the regions that the
device is told of must never change, and inside them only what a descriptor gives to it.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterable
from typing import NamedTuple

from fuzz.choices import Choices

__all__ = ["FILE_BYTES", "LAYOUTS", "Guest", "Piece"]

FILE_BYTES = 1 << 18
TOP = 1 << 64
NOISE = random.Random(0).randbytes(FILE_BYTES)


class Piece(NamedTuple):
    """A region as a front end tells it."""

    guest_addr: int
    size: int
    user_addr: int
    offset: int

    @property
    def end(self) -> int:
        return self.guest_addr + self.size


USER = 0x7F00_0000_0000

# No size is a whole number of pages but where it must be: the rest of the page is a canary.
LAYOUTS = (
    (Piece(0x10000, 0xC230, USER, 0x4000), Piece(1 << 32, 0xC010, USER << 1, 0x14000)),
    # Neighbours for the guest, the other way round in the file.
    (Piece(0x10000, 0xC200, USER, 0x14000), Piece(0x1C200, 0xBE10, USER + 0x10_0000, 0x3000)),
    (Piece(0, 0xDFF8, USER, 0x2008),),
    (Piece(TOP - 0xE000, 0xDFF0, USER, 0x8000), Piece(0x1000, 0xC000, 0x1000, 0x18000)),
    # One file range under two guest addresses.
    (Piece(0x10000, 0xD000, USER, 0x4000), Piece(0x80000, 0xD000, USER + 0x80000, 0x4000)),
)


class Guest:
    """The file, its mapping here, and the parts that the device is told of."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzzed-guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, FILE_BYTES)
        self._map = mmap.mmap(self.fd, FILE_BYTES)
        self.bytes = memoryview(self._map)
        self.pieces: tuple[Piece, ...] = LAYOUTS[0]

    def reset(self, pieces: tuple[Piece, ...]) -> None:
        self.pieces = pieces
        self.bytes[:] = NOISE

    def close(self) -> None:
        self.bytes.release()
        self._map.close()
        os.close(self.fd)

    # Addresses --------------------------------------------------------------------------

    def file_ranges(self, addr: int, length: int) -> Iterable[tuple[int, int]]:
        """(offset, length) of those bytes in the file, up to the first that is not there."""
        while length > 0:
            piece = next((p for p in self.pieces if p.guest_addr <= addr < p.end), None)
            if piece is None:
                return
            part = min(length, piece.end - addr)
            yield piece.offset + addr - piece.guest_addr, part
            addr += part
            length -= part

    def read(self, addr: int, length: int) -> bytes:
        """What is there; shorter when it ends before."""
        return b"".join(self.bytes[at : at + n] for at, n in self.file_ranges(addr, length))

    def write(self, addr: int, data: bytes) -> None:
        for at, part in self.file_ranges(addr, len(data)):
            self.bytes[at : at + part] = data[:part]
            data = data[part:]

    def user_addr(self, addr: int) -> int:
        """As the front end names it; an address outside stays what it is."""
        for piece in self.pieces:
            if piece.guest_addr <= addr < piece.end:
                return piece.user_addr + addr - piece.guest_addr
        return addr

    def wild_address(self, choices: Choices) -> int:
        """Where a border, a hole or a mistake is."""
        piece = choices.pick(self.pieces)
        near = choices.below(40)
        return (
            choices.pick(
                (
                    piece.end - near,
                    piece.end,
                    piece.guest_addr - 1 - near,
                    piece.guest_addr,
                    piece.end + near,
                    piece.user_addr,
                    0,
                    TOP - 1 - near,
                    TOP - 0x1000 - near,
                    choices.number(8),
                    1 << 63,
                )
            )
            % TOP
        )

    # Canaries ---------------------------------------------------------------------------

    def snapshot(self) -> bytearray:
        return bytearray(self.bytes)

    def changed_outside(self, before: bytearray, allowed: Iterable[tuple[int, int]]) -> list[int]:
        """File offsets that changed, but for (guest address, length) in ``allowed``."""
        for addr, length in allowed:
            for at, part in self.file_ranges(addr, length):
                before[at : at + part] = self.bytes[at : at + part]
        if before == self.bytes:
            return []
        return [at for at in range(FILE_BYTES) if before[at] != self.bytes[at]]

    def all_of_it(self) -> list[tuple[int, int]]:
        return [(piece.guest_addr, piece.size) for piece in self.pieces]

    def share_a_byte(
        self, some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
    ) -> bool:
        """Whether two lists of (guest address, length) name the same byte of the file."""
        taken = bytearray(FILE_BYTES)
        for addr, length in others:
            for at, part in self.file_ranges(addr, length):
                taken[at : at + part] = b"\1" * part
        return any(
            taken.find(1, at, at + part) >= 0
            for addr, length in some
            for at, part in self.file_ranges(addr, length)
        )
