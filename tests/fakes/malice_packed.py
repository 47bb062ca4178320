"""What a guest must never put into a packed ring, one named act each.

BAD_PACKED_RINGS make a queue unusable: the device must give this queue up and say so. Each act
writes through PackedRing's pokes, at the place where the device looks next. Never imports
drivebay. Context: tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.fakes.driver import STATUS_UNTOUCHED, Kind
from tests.fakes.packed_ring import PACKED_DESC, PackedRing
from tests.fakes.ring import F_INDIRECT, F_NEXT, F_WRITE

Act = Callable[[PackedRing], None]

FAR = 0xDEAD_0000_0000
TOP = (1 << 64) - 16


def header_at(ring: PackedRing) -> int:
    addr = ring.memory.allocate(16)
    ring.memory.write(addr, struct.pack("<IIQ", Kind.IN, 0, 0))
    return addr


def buffer_at(ring: PackedRing, length: int = 513) -> int:
    addr = ring.memory.allocate(length)
    ring.memory.write(addr, bytes([STATUS_UNTOUCHED]) * length)
    return addr


def offer(ring: PackedRing, *descs: tuple[int, int, int]) -> None:
    """Put (addr, length, flags) there as one chain, its first descriptor last."""
    first = ring.position
    for offset, (addr, length, flags) in reversed(list(enumerate(descs))):
        position = first + offset
        ring.poke_desc(position, addr, length, 1, flags | ring.available(position))


def chain_that_never_ends(ring: PackedRing) -> None:
    data = buffer_at(ring)
    header = (header_at(ring), 16, F_NEXT)
    offer(ring, header, *[(data, 512, F_NEXT | F_WRITE)] * (ring.size - 1))


def chain_over_what_is_in_flight(ring: PackedRing) -> None:
    """Every descriptor claims to be available and continued, whosever it is."""
    data = header_at(ring)
    offer(ring, *[(data, 16, F_NEXT)] * ring.size)


def _with_data(ring: PackedRing, addr: int, length: int) -> None:
    offer(
        ring,
        (header_at(ring), 16, F_NEXT),
        (addr, length, F_NEXT | F_WRITE),
        (buffer_at(ring, 1), 1, F_WRITE),
    )


def data_outside_memory(ring: PackedRing) -> None:
    _with_data(ring, FAR, 512)


def data_that_wraps(ring: PackedRing) -> None:
    _with_data(ring, TOP, 4096)


def data_of_4_gib(ring: PackedRing) -> None:
    _with_data(ring, buffer_at(ring), 0xFFFF_FFFF)


def data_over_the_end_of_memory(ring: PackedRing) -> None:
    _with_data(ring, ring.memory.regions[-1].end - 256, 512)


def data_at_a_front_end_address(ring: PackedRing) -> None:
    _with_data(ring, ring.memory.regions[0].user_addr, 512)


def readable_after_writable(ring: PackedRing) -> None:
    offer(
        ring,
        (header_at(ring), 16, F_NEXT),
        (buffer_at(ring), 512, F_NEXT | F_WRITE),
        (buffer_at(ring), 512, 0),
    )


def status_outside_memory(ring: PackedRing) -> None:
    offer(ring, (header_at(ring), 16, F_NEXT), (FAR, 1, F_WRITE))


def _good_table(ring: PackedRing) -> int:
    table = ring.memory.allocate(32, 16)
    descs = PACKED_DESC.pack(header_at(ring), 16, 0, 0)
    ring.memory.write(table, descs + PACKED_DESC.pack(buffer_at(ring), 513, 0, F_WRITE))
    return table


def table_of_no_length(ring: PackedRing) -> None:
    offer(ring, (_good_table(ring), 0, F_INDIRECT))


def table_of_odd_length(ring: PackedRing) -> None:
    offer(ring, (_good_table(ring), 31, F_INDIRECT))


def table_of_enormous_length(ring: PackedRing) -> None:
    offer(ring, (_good_table(ring), 0xFFFF_FFF0, F_INDIRECT))


def table_longer_than_the_ring(ring: PackedRing) -> None:
    table = ring.memory.allocate(16 * (ring.size + 1), 16)
    data = buffer_at(ring)
    ring.memory.write(table, PACKED_DESC.pack(data, 1, 0, 0) * (ring.size + 1))
    offer(ring, (table, 16 * (ring.size + 1), F_INDIRECT))


def table_outside_memory(ring: PackedRing) -> None:
    offer(ring, (FAR, 32, F_INDIRECT))


def table_that_wraps(ring: PackedRing) -> None:
    offer(ring, (TOP, 32, F_INDIRECT))


def table_with_data_outside_memory(ring: PackedRing) -> None:
    table = ring.memory.allocate(32, 16)
    descs = PACKED_DESC.pack(header_at(ring), 16, 0, 0)
    ring.memory.write(table, descs + PACKED_DESC.pack(FAR, 513, 0, F_WRITE))
    offer(ring, (table, 32, F_INDIRECT))


def table_behind_a_direct_descriptor(ring: PackedRing) -> None:
    """§2.8.17: no INDIRECT in a list linked by NEXT."""
    offer(ring, (header_at(ring), 16, F_NEXT), (_good_table(ring), 32, F_INDIRECT))


def table_that_continues(ring: PackedRing) -> None:
    offer(ring, (_good_table(ring), 32, F_INDIRECT | F_NEXT), (buffer_at(ring), 513, F_WRITE))


BAD_PACKED_RINGS: dict[str, Act] = {
    act.__name__: act
    for act in (
        chain_that_never_ends,
        chain_over_what_is_in_flight,
        data_outside_memory,
        data_that_wraps,
        data_of_4_gib,
        data_over_the_end_of_memory,
        data_at_a_front_end_address,
        readable_after_writable,
        status_outside_memory,
        table_of_no_length,
        table_of_odd_length,
        table_of_enormous_length,
        table_longer_than_the_ring,
        table_outside_memory,
        table_that_wraps,
        table_with_data_outside_memory,
        table_behind_a_direct_descriptor,
        table_that_continues,
    )
}
