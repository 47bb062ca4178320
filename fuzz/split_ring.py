"""The driver's side of a split ring (virtio 1.3 §2.7) that lies now and then."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from fuzz.chains import F_INDIRECT, F_NEXT, F_WRITE, Buffer
from fuzz.choices import Choices
from fuzz.guest import Guest

__all__ = ["SplitRing"]

DESC = struct.Struct("<QIHH")
TABLES_AREA = 0x6C00  # indirect tables, before the data


class SplitRing:
    """One ring somewhere in a guest's memory."""

    def __init__(self, guest: Guest, choices: Choices, size: int, base: int) -> None:
        self.guest = guest
        self.size = size
        self.next_used = base
        self.index = base
        self.taken = 0  # descriptors since the last publication
        self.free = 0
        self.table = 0
        piece = choices.pick(guest.pieces)
        self.origin = piece.guest_addr + (-piece.guest_addr - piece.offset) % 16
        self.desc = self.origin
        self.avail = self.desc + 16 * size + choices.pick((0, 2, 64))
        self.used = (self.avail + 6 + 2 * size + 63) // 64 * 64
        match choices.below(24):
            case 21:
                self.used = self.avail // 4 * 4
            case 22:
                self.avail = self.desc
            case 23:
                self.used = self.desc
        guest.write(self.desc, bytes(16 * size))
        guest.write(self.avail, bytes(6 + 2 * size))
        guest.write(self.used, bytes(6 + 8 * size))
        self._word(self.avail + 2, base)
        self._word(self.used + 2, base)

    @property
    def parts(self) -> dict[str, int]:
        """Front-end addresses, by the names of BlkQueue's arguments."""
        names = {"desc": self.desc, "avail": self.avail, "used": self.used}
        return {name: self.guest.user_addr(addr) for name, addr in names.items()}

    def _word(self, addr: int, value: int) -> None:
        self.guest.write(addr, struct.pack("<H", value & 0xFFFF))

    def spans(self) -> tuple[tuple[int, int], ...]:
        """(guest address, length) of its parts."""
        return (
            (self.avail, 6 + 2 * self.size),
            (self.desc, 16 * self.size),
            (self.used, 6 + 8 * self.size),
        )

    @staticmethod
    def first_base(choices: Choices, _size: int) -> int:
        return choices.pick((0, 0, 0xFFFE, 1, 0x7FFF))

    def take_used(self) -> bool:
        """Whether the next chain came back; the one after it is the next then."""
        if self.guest.read(self.used + 2, 2) == self.next_used.to_bytes(2, "little"):
            return False
        self.next_used = (self.next_used + 1) & 0xFFFF
        return True

    # What a driver does -----------------------------------------------------------------

    def add(self, chain: Sequence[Buffer], choices: Choices) -> None:
        """Descriptors for a chain, and its head into the avail ring; unpublished."""
        if choices.pick((False, False, True)):
            chain = [self._indirect(chain, choices)]
        self.taken += len(chain)
        if self.taken > self.size and not choices.rarely(40):
            return
        head = self.free % self.size
        for place, buffer in enumerate(chain[: 2 * self.size]):
            last = place == len(chain) - 1
            self._desc(self.desc, self.free % self.size, buffer, last, self.free + 1, choices)
            self.free += 1
        if choices.rarely(40):
            head = choices.pick((self.size, 0xFFFF, choices.number(2), 0))
        self._word(self.avail + 4 + 2 * (self.index % self.size), head)
        self.index += 1

    def _desc(
        self, table: int, at: int, buffer: Buffer, last: bool, after: int, choices: Choices
    ) -> None:
        flags = buffer.flags if last else buffer.flags | F_NEXT
        after %= self.size
        if choices.rarely(100):
            after = choices.pick((at, 0, self.size, self.size - 1, 0xFFFF, choices.number(2)))
            flags |= F_NEXT
        packed = DESC.pack(buffer.addr, buffer.length, flags & 0xFFFF, after)
        self.guest.write(table + 16 * at, packed)

    def _indirect(self, chain: Sequence[Buffer], choices: Choices) -> Buffer:
        """A table elsewhere; returns the buffer that it is."""
        piece = choices.pick(self.guest.pieces)
        room = TABLES_AREA + 16 * len(chain)
        table = piece.guest_addr + TABLES_AREA + self.table % 0x400
        if choices.rarely(12):  # over the end of a region: part of it is elsewhere, or nowhere
            table = piece.end - choices.below(room % 200 + 1)
        self.table += 16 * len(chain)
        for place, buffer in enumerate(chain):
            self._desc(table, place, buffer, place == len(chain) - 1, place + 1, choices)
        length = 16 * len(chain)
        if choices.rarely(30):
            length = choices.pick((0, 1, length + 1, length - 16, 16 * self.size + 16, 0xFFFF_FFF0))
        return Buffer(table, length, F_INDIRECT)

    def publish(self, choices: Choices) -> None:
        if choices.rarely(40):
            self.index += choices.pick((1, self.size, self.size + 1, 0x8000, -1, choices.number(2)))
        self._word(self.avail + 2, self.index)
        self.taken = 0

    def scramble(self, choices: Choices) -> None:
        """Anything anywhere in the ring."""
        part, length = choices.pick(self.spans())
        at = choices.number(2) % length
        self.guest.write(part + at, choices.raw(choices.pick((1, 2, 4, 8))))

    def ask_for_calls(self, choices: Choices) -> None:
        self._word(self.avail, choices.pick((0, 1, choices.number(2))))
        self._word(self.avail + 4 + 2 * self.size, choices.number(2))

    # What the device may do -------------------------------------------------------------

    def device_writes(self) -> list[tuple[int, int]] | None:
        """A superset of what it may write now, as (address, length).

        None: it may write to its own descriptors, so nobody can tell.
        """
        allowed = [(self.used, 6 + 8 * self.size)]
        tables = [(self.desc, 16 * self.size), (self.avail, 6 + 2 * self.size)]
        for desc in descriptors(self.guest.read(self.desc, 16 * self.size)):
            if desc.flags & F_INDIRECT:
                length = min(desc.length, 16 * self.size)
                tables.append((desc.addr, length))
                inner = descriptors(self.guest.read(desc.addr, length))
                allowed += [(d.addr, d.length) for d in inner if d.flags & F_WRITE]
            elif desc.flags & F_WRITE:
                allowed.append((desc.addr, desc.length))
        return None if self.guest.share_a_byte(allowed, tables) else allowed


def descriptors(table: bytes) -> Iterator[Buffer]:
    for addr, length, flags, _ in DESC.iter_unpack(table[: len(table) // 16 * 16]):
        yield Buffer(addr, length, flags)
