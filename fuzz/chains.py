"""virtio-blk requests as lists of buffers, right in most fields most of the time."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fuzz.choices import Choices
from fuzz.guest import Guest

__all__ = ["F_INDIRECT", "F_NEXT", "F_WRITE", "Buffer", "make_chain"]

F_NEXT = 1
F_WRITE = 2
F_INDIRECT = 4

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
KINDS = (IN, OUT, IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 2, 10, 14, 0xFFFF_FFFF)
DATA_LENGTHS = (512, 4096, 1024, 512, 8192, 0, 1, 511, 513, 0x8000, 0xFFFF_FFFF)
SEGMENTS = (1, 1, 2, 1, 0, 3, 9, 40, 126, 200)
ODD_LENGTHS = (0, 1, 15, 16, 17, 4095, 0x10000, 0x7FFF_FFFF, 0xFFFF_FFF0, 0xFFFF_FFFF)
DATA_AREA = 0x7800  # behind the longest ring, in each region


class Buffer(NamedTuple):
    addr: int
    length: int
    flags: int


def make_chain(guest: Guest, choices: Choices) -> list[Buffer]:
    """One request; its header is written, its buffers are only named."""
    kind = choices.pick(KINDS)
    sector = choices.pick((choices.below(128), 127, 128, 1 << 55, (1 << 55) - 1, (1 << 64) - 1))
    head = struct.pack("<IIQ", kind, 0, sector)
    header = data_address(guest, choices)
    if kind in (DISCARD, WRITE_ZEROES):
        count = choices.pick((1, 8, 128, 0, 0xFFFF_FFFF))
        head += struct.pack("<QII", sector, count, choices.pick((0, 1, 2, 0xFFFF_FFFF)))
    guest.write(header, head)
    chain = [Buffer(header, len(head), 0)]
    if kind in (IN, OUT, GET_ID) or choices.rarely(8):
        write = F_WRITE if kind in (IN, GET_ID) else 0
        chain += [
            Buffer(data_address(guest, choices), choices.pick(DATA_LENGTHS[:4]), write)
            for _ in range(choices.pick(SEGMENTS))
        ]
    chain.append(Buffer(data_address(guest, choices), 1, F_WRITE))
    return [spoilt(guest, choices, buffer) for buffer in chain]


def data_address(guest: Guest, choices: Choices) -> int:
    piece = choices.pick(guest.pieces)
    return piece.guest_addr + DATA_AREA + choices.number(2) % (piece.size - DATA_AREA - 0x400)


def spoilt(guest: Guest, choices: Choices, buffer: Buffer) -> Buffer:
    """The same buffer, but once in a while."""
    match choices.below(64):
        case 60:
            return buffer._replace(addr=guest.wild_address(choices))
        case 61:
            return buffer._replace(length=choices.pick((*DATA_LENGTHS, *ODD_LENGTHS)))
        case 62:
            return buffer._replace(flags=buffer.flags ^ F_WRITE)
        case 63:
            return buffer._replace(flags=choices.number(2) & ~F_NEXT)
    return buffer
