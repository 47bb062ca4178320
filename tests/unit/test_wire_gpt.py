"""Partition tables: what is made is read back, and what is damaged is refused with a sentence."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from uuid import UUID

import pytest

from drivebay.wire.gpt import (
    SPDK_TYPE,
    Entry,
    GptError,
    Table,
    add_entry,
    is_protective_mbr,
    new_table,
    pack_protective_mbr,
    parse_entries,
    parse_header,
    parse_table,
    table_writes,
)

DISK = UUID("11111111-2222-3333-4444-555555555555")
PART = UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
BLOCKS = 4096


def entry(number: int = 1, first: int = 2048, last: int = 3000, name: str = "fast disks") -> Entry:
    return Entry(number, SPDK_TYPE, PART, first, last, 0, name)


def written(table: Table, block_bytes: int = 512, blocks: int = BLOCKS) -> bytearray:
    disk = bytearray(blocks * block_bytes)
    for group in table_writes(table, block_bytes):
        for offset, data in group:
            disk[offset : offset + len(data)] = data
    return disk


def read(disk: bytes | bytearray, lba: int = 1, block_bytes: int = 512) -> Table:
    blocks = len(disk) // block_bytes
    block = disk[lba * block_bytes : (lba + 1) * block_bytes]
    header = parse_header(bytes(block), lba, block_bytes, blocks)
    start = header.entries_lba * block_bytes
    return parse_table(header, bytes(disk[start : start + header.entries_bytes]))


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_what_is_written_is_read_back_from_both_places(block_bytes: int) -> None:
    table = add_entry(new_table(BLOCKS, block_bytes, DISK), entry())
    disk = written(table, block_bytes)
    assert read(disk, 1, block_bytes) == table
    copy = read(disk, BLOCKS - 1, block_bytes)
    assert copy.entries == table.entries == (entry(),)
    assert copy.header.own_lba == BLOCKS - 1
    assert copy.header.other_lba == 1


def test_the_layout_is_that_of_the_specification() -> None:
    disk = written(add_entry(new_table(BLOCKS, 512, DISK), entry()))
    assert disk[512:524] == b"EFI PART\0\0\1\0"
    assert disk[568:584] == bytes.fromhex("11111111222233334444555555555555")
    first = bytes(disk[1024:1152])
    assert first[:16] == bytes.fromhex("4e992765 5a2c ec4e 9613 8f5944074e8b".replace(" ", ""))
    assert struct.unpack_from("<QQ", first, 32) == (2048, 3000)
    assert first[56:76].decode("utf-16-le") == "fast disks"
    mbr = pack_protective_mbr(BLOCKS, 512)
    assert is_protective_mbr(mbr)
    assert mbr[446:462] == bytes.fromhex("00000200eeffffff01000000ff0f0000")
    assert not is_protective_mbr(bytes(512))


def test_adding_keeps_what_is_there_and_finds_no_room_where_there_is_none() -> None:
    table = add_entry(new_table(BLOCKS, 512, DISK), entry())
    both = add_entry(table, entry(5, 100, 2047, "second"))
    assert both.raw_entries[:128] == table.raw_entries[:128]
    assert [found.number for found in both.entries] == [1, 5]
    for wrong in (
        entry(1, 100, 200),
        entry(0, 100, 200),
        entry(129, 100, 200),
        entry(2, 2500, 3500),
        entry(2, 10, 100),
        entry(2, 3001, BLOCKS - 1),
        entry(2, 200, 100),
        entry(2, 100, 200, "x" * 37),
    ):
        with pytest.raises(GptError):
            add_entry(table, wrong)


def test_the_copy_is_written_before_the_table() -> None:
    copy, primary = table_writes(new_table(BLOCKS, 512, DISK), 512)
    assert [offset // 512 for offset, _ in copy] == [BLOCKS - 33, BLOCKS - 1]
    assert [offset // 512 for offset, _ in primary] == [2, 1]


def test_a_disk_without_room_is_refused() -> None:
    new_table(68, 512, DISK)
    with pytest.raises(GptError, match="no room"):
        new_table(67, 512, DISK)


def test_each_flipped_bit_of_the_header_is_noticed() -> None:
    disk = written(add_entry(new_table(BLOCKS, 512, DISK), entry()))
    for bit in range(92 * 8):
        if 20 * 8 <= bit < 24 * 8:  # reserved: under the checksum as zeroes
            continue
        disk[512 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(GptError):
            read(disk)
        disk[512 + bit // 8] ^= 1 << bit % 8


def test_flipped_bits_of_the_entries_are_noticed() -> None:
    disk = written(add_entry(new_table(BLOCKS, 512, DISK), entry()))
    for place in (1024, 1024 + 40, 1024 + 128 * 127):
        disk[place] ^= 4
        with pytest.raises(GptError, match="checksum of the GPT entries"):
            read(disk)
        disk[place] ^= 4


# (offset in the header, layout, value): what a header with a right checksum must not say.
LIES = {
    "size": (12, "<I", 513),
    "short": (12, "<I", 91),
    "revision": (8, "<I", 0x00020000),
    "own place": (24, "<Q", 2),
    "other place": (32, "<Q", BLOCKS),
    "first usable": (40, "<Q", 1),
    "first behind last": (40, "<Q", BLOCKS),
    "last usable": (48, "<Q", 2**63),
    "entries in the usable blocks": (72, "<Q", 40),
    "entries beyond the disk": (72, "<Q", 2**64 - 1),
    "entries over the header": (72, "<Q", 1),
    "no entries": (80, "<I", 0),
    "very many entries": (80, "<I", 2**32 - 1),
    "small entries": (84, "<I", 64),
    "odd entries": (84, "<I", 129),
    "large entries": (84, "<I", 2**31),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_with_a_right_checksum_is_refused(lie: str) -> None:
    disk = written(new_table(BLOCKS, 512, DISK))
    offset, layout, value = LIES[lie]
    struct.pack_into(layout, disk, 512 + offset, value)
    struct.pack_into("<I", disk, 512 + 16, 0)
    size = struct.unpack_from("<I", disk, 512 + 12)[0]
    struct.pack_into("<I", disk, 512 + 16, zlib.crc32(disk[512 : 512 + min(size, 512)]))
    with pytest.raises(GptError):
        read(disk)


def test_entries_that_overlap_or_leave_the_usable_blocks_are_refused() -> None:
    table = new_table(BLOCKS, 512, DISK)
    one = add_entry(table, entry()).raw_entries[:128]
    two = add_entry(table, entry(1, 3000, 3100)).raw_entries[:128]
    outside = add_entry(table, entry(1, 34, 40)).raw_entries[:32] + struct.pack("<QQ", 33, 40)
    for raw in (one + two, outside.ljust(128, b"\0")):
        raw = raw.ljust(128 * 128, b"\0")
        with pytest.raises(GptError, match="overlap|outside"):
            parse_entries(replace(table.header, entries_crc=zlib.crc32(raw)), raw)


def test_a_copy_without_room_is_not_written() -> None:
    table = new_table(BLOCKS, 512, DISK)
    crowded = replace(table, header=replace(table.header, last_usable=BLOCKS - 20))
    with pytest.raises(GptError, match="where partitions may lie"):
        table_writes(crowded, 512)
