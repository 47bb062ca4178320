"""What a guest must never put into a ring, one named act each.

BAD_RINGS make a queue unusable: the device must give this queue up and say so. BAD_CHAINS are
requests that cannot be answered: the chain comes back with used length 0 and the queue goes on.
Each act writes through SplitRing's pokes and publishes. Never imports drivebay. Context: tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.fakes.driver import STATUS_UNTOUCHED, Kind
from tests.fakes.ring import DESC, F_INDIRECT, F_NEXT, F_WRITE, SplitRing

Act = Callable[[SplitRing], None]

FAR = 0xDEAD_0000_0000
TOP = (1 << 64) - 16


def header_at(ring: SplitRing, kind: int = Kind.IN, sector: int = 0) -> int:
    addr = ring.memory.allocate(16)
    ring.memory.write(addr, struct.pack("<IIQ", kind, 0, sector))
    return addr


def buffer_at(ring: SplitRing, length: int = 512) -> int:
    addr = ring.memory.allocate(length)
    ring.memory.write(addr, bytes([STATUS_UNTOUCHED]) * length)
    return addr


def offer(ring: SplitRing, *heads: int) -> None:
    """Publish those heads as the next avail entries."""
    for offset, head in enumerate(heads):
        ring.poke_avail(ring.avail_idx + offset, head)
    ring.poke_avail_idx(ring.avail_idx + len(heads))


def chain_through_itself(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, 0)
    offer(ring, 0)


def chain_of_two_in_a_circle(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, 1)
    ring.poke_desc(1, buffer_at(ring), 512, F_NEXT | F_WRITE, 0)
    offer(ring, 0)


def chain_through_the_whole_ring_and_on(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, 1)
    data = buffer_at(ring)
    for index in range(1, ring.size):
        ring.poke_desc(index, data, 512, F_NEXT | F_WRITE, (index + 1) % ring.size)
    offer(ring, 0)


def next_just_out_of_range(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, ring.size)
    offer(ring, 0)


def next_far_out_of_range(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, 0xFFFF)
    offer(ring, 0)


def _with_data(ring: SplitRing, addr: int, length: int) -> None:
    ring.poke_desc(0, header_at(ring), 16, F_NEXT, 1)
    ring.poke_desc(1, addr, length, F_NEXT | F_WRITE, 2)
    ring.poke_desc(2, buffer_at(ring, 1), 1, F_WRITE)
    offer(ring, 0)


def data_outside_memory(ring: SplitRing) -> None:
    _with_data(ring, FAR, 512)


def data_that_wraps(ring: SplitRing) -> None:
    _with_data(ring, TOP, 4096)


def data_of_4_gib(ring: SplitRing) -> None:
    _with_data(ring, buffer_at(ring), 0xFFFF_FFFF)


def data_over_the_end_of_memory(ring: SplitRing) -> None:
    _with_data(ring, ring.memory.regions[-1].end - 256, 512)


def data_into_the_hole_between_regions(ring: SplitRing) -> None:
    _with_data(ring, ring.memory.regions[0].end - 256, 512)


def data_at_a_front_end_address(ring: SplitRing) -> None:
    _with_data(ring, ring.memory.regions[0].user_addr, 512)


def header_outside_memory(ring: SplitRing) -> None:
    ring.poke_desc(0, FAR, 16, F_NEXT, 1)
    ring.poke_desc(1, buffer_at(ring), 513, F_WRITE)
    offer(ring, 0)


def status_outside_memory(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring, Kind.FLUSH), 16, F_NEXT, 1)
    ring.poke_desc(1, FAR, 1, F_WRITE)
    offer(ring, 0)


def _indirect(ring: SplitRing, table: bytes, *, length: int | None = None, flags: int = 0) -> None:
    addr = ring.memory.allocate(max(len(table), 16), 16)
    ring.memory.write(addr, table)
    ring.poke_desc(0, addr, len(table) if length is None else length, F_INDIRECT | flags)
    offer(ring, 0)


def _good_table(ring: SplitRing) -> bytes:
    first = DESC.pack(header_at(ring), 16, F_NEXT, 1)
    return first + DESC.pack(buffer_at(ring, 513), 513, F_WRITE, 0)


def indirect_of_no_length(ring: SplitRing) -> None:
    _indirect(ring, _good_table(ring), length=0)


def indirect_of_odd_length(ring: SplitRing) -> None:
    _indirect(ring, _good_table(ring), length=31)


def indirect_of_enormous_length(ring: SplitRing) -> None:
    _indirect(ring, _good_table(ring), length=0xFFFF_FFF0)


def indirect_outside_memory(ring: SplitRing) -> None:
    ring.poke_desc(0, FAR, 32, F_INDIRECT)
    offer(ring, 0)


def indirect_that_wraps(ring: SplitRing) -> None:
    ring.poke_desc(0, TOP, 32, F_INDIRECT)
    offer(ring, 0)


def indirect_within_indirect(ring: SplitRing) -> None:
    inner = ring.memory.allocate(32, 16)
    ring.memory.write(inner, _good_table(ring))
    _indirect(ring, DESC.pack(inner, 32, F_INDIRECT, 0))


def indirect_through_itself(ring: SplitRing) -> None:
    addr = ring.memory.allocate(16, 16)
    ring.memory.write(addr, DESC.pack(addr, 16, F_INDIRECT, 0))
    ring.poke_desc(0, addr, 16, F_INDIRECT)
    offer(ring, 0)


def indirect_that_loops(ring: SplitRing) -> None:
    first = DESC.pack(header_at(ring), 16, F_NEXT, 1)
    _indirect(ring, first + DESC.pack(buffer_at(ring), 512, F_NEXT | F_WRITE, 1))


def indirect_next_beyond_its_table(ring: SplitRing) -> None:
    first = DESC.pack(header_at(ring), 16, F_NEXT, 2)
    _indirect(ring, first + DESC.pack(buffer_at(ring, 513), 513, F_WRITE, 0))


def head_just_out_of_range(ring: SplitRing) -> None:
    offer(ring, ring.size)


def head_far_out_of_range(ring: SplitRing) -> None:
    offer(ring, 0xFFFF)


def avail_index_one_too_far(ring: SplitRing) -> None:
    ring.poke_avail_idx(ring.avail_idx + ring.size + 1)


def avail_index_half_way_round(ring: SplitRing) -> None:
    ring.poke_avail_idx(ring.avail_idx + 0x8000)


def avail_index_backwards(ring: SplitRing) -> None:
    ring.poke_avail_idx(ring.avail_idx - 1)


def _header_of(ring: SplitRing, length: int) -> None:
    ring.poke_desc(0, header_at(ring), length, F_NEXT, 1)
    ring.poke_desc(1, buffer_at(ring, 513), 513, F_WRITE)
    offer(ring, 0)


def header_one_byte_short(ring: SplitRing) -> None:
    _header_of(ring, 15)


def header_of_one_byte(ring: SplitRing) -> None:
    _header_of(ring, 1)


def no_readable_buffer(ring: SplitRing) -> None:
    ring.poke_desc(0, buffer_at(ring, 513), 513, F_WRITE)
    offer(ring, 0)


def no_writable_buffer(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring, Kind.OUT), 16, F_NEXT, 1)
    ring.poke_desc(1, buffer_at(ring), 512)
    offer(ring, 0)


def header_alone(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring, Kind.FLUSH), 16)
    offer(ring, 0)


def status_of_no_length(ring: SplitRing) -> None:
    ring.poke_desc(0, header_at(ring, Kind.FLUSH), 16, F_NEXT, 1)
    ring.poke_desc(1, buffer_at(ring, 1), 0, F_WRITE)
    offer(ring, 0)


BAD_RINGS: dict[str, Act] = {
    act.__name__: act
    for act in (
        chain_through_itself,
        chain_of_two_in_a_circle,
        chain_through_the_whole_ring_and_on,
        next_just_out_of_range,
        next_far_out_of_range,
        data_outside_memory,
        data_that_wraps,
        data_of_4_gib,
        data_over_the_end_of_memory,
        data_into_the_hole_between_regions,
        data_at_a_front_end_address,
        header_outside_memory,
        status_outside_memory,
        indirect_of_no_length,
        indirect_of_odd_length,
        indirect_of_enormous_length,
        indirect_outside_memory,
        indirect_that_wraps,
        indirect_within_indirect,
        indirect_through_itself,
        indirect_that_loops,
        indirect_next_beyond_its_table,
        head_just_out_of_range,
        head_far_out_of_range,
        avail_index_one_too_far,
        avail_index_half_way_round,
        avail_index_backwards,
    )
}

BAD_CHAINS: dict[str, Act] = {
    act.__name__: act
    for act in (
        header_one_byte_short,
        header_of_one_byte,
        no_readable_buffer,
        no_writable_buffer,
        header_alone,
        status_of_no_length,
    )
}
