"""Partition tables of a real tool, tables that lie with the right checksum, and power cuts."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from drivebay.wire.gpt import (
    ENTRIES_BYTES_MOST,
    SPDK_TYPE,
    SPDK_TYPE_OLD,
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

MIB = 1 << 20
BLOCKS = 8 * MIB // 512
DISK, ONE, TWO, NEW = (UUID(f"0a0a0a0a-0000-4000-8000-00000000000{i}") for i in range(4))
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def read_copy(disk: bytes | bytearray, lba: int) -> Table:
    block = bytes(disk[lba * 512 : (lba + 1) * 512])
    header = parse_header(block, lba, 512, len(disk) // 512)
    start = header.entries_lba * 512
    return parse_table(header, bytes(disk[start : start + header.entries_bytes]))


def read_primary(disk: bytes | bytearray) -> Table:
    return read_copy(disk, 1)


def read_secondary(disk: bytes | bytearray) -> Table:
    return read_copy(disk, len(disk) // 512 - 1)


def write(disk: bytearray, table: Table) -> None:
    for group in table_writes(table, 512):
        for offset, data in group:
            disk[offset : offset + len(data)] = data


def a_disk() -> bytearray:
    """With a partition of SPDK's type and a foreign one."""
    disk = bytearray(8 * MIB)
    table = add_entry(new_table(BLOCKS, 512, DISK), Entry(1, SPDK_TYPE, ONE, 2048, 6143, 0, "pool"))
    write(disk, add_entry(table, Entry(2, LINUX, TWO, 6144, 8191, 0, "the guest's")))
    disk[:512] = pack_protective_mbr(BLOCKS, 512)
    return disk


# ---- a real tool ------------------------------------------------------------------------------


def sfdisk(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["/usr/sbin/sfdisk", *words], input=stdin, text=True, capture_output=True, check=True
    )
    return done.stdout


def read_with_sfdisk(image: Path) -> dict[str, Any]:
    """What it finds; it says so when anything is wrong."""
    said = sfdisk("--verify", str(image))
    assert "No errors detected" in said, said
    table: dict[str, Any] = json.loads(sfdisk("--json", str(image)))["partitiontable"]
    return table


def test_a_table_of_sfdisk_is_read_and_added_to(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    script = (
        f"label: gpt\nlabel-id: {DISK}\n"
        f'start=2048, size=4096, type={SPDK_TYPE}, uuid={ONE}, name="pool ä"\n'
        f"start=10240, size=2048, type={SPDK_TYPE_OLD}\n"
        f"start=20480, size=2048, type={LINUX}, uuid={TWO}\n"
    )
    sfdisk(str(image), stdin=script)
    disk = bytearray(image.read_bytes())
    assert is_protective_mbr(bytes(disk[:512]))
    table = read_primary(disk)
    assert read_secondary(disk).entries == table.entries
    assert table.header.disk_guid == DISK
    assert [(e.number, e.type_guid, e.first_lba, e.last_lba) for e in table.entries] == [
        (1, SPDK_TYPE, 2048, 6143),
        (2, SPDK_TYPE_OLD, 10240, 12287),
        (3, LINUX, 20480, 22527),
    ]
    assert (table.entries[0].unique_guid, table.entries[0].name) == (ONE, "pool ä")
    before = read_with_sfdisk(image)
    write(disk, add_entry(table, Entry(4, SPDK_TYPE, NEW, 6144, 7143, 0, "neu")))
    image.write_bytes(disk)
    after = read_with_sfdisk(image)
    new = after["partitions"].pop()
    assert after == before
    assert (new["start"], new["size"], new["name"]) == (6144, 1000, "neu")
    assert new["type"].lower() == str(SPDK_TYPE)
    assert new["uuid"].lower() == str(NEW)


def test_a_table_of_ours_is_read_by_sfdisk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(a_disk())
    found = read_with_sfdisk(image)
    assert found["label"] == "gpt"
    assert found["id"].lower() == str(DISK)
    assert [(p["start"], p["size"], p["name"]) for p in found["partitions"]] == [
        (2048, 4096, "pool"),
        (6144, 2048, "the guest's"),
    ]


# ---- nothing is believed ----------------------------------------------------------------------


def is_refused(disk: bytearray, lba: int) -> bool:
    try:
        read_copy(disk, lba)
    except GptError:
        return True
    return False


def test_every_flipped_byte_is_seen() -> None:
    disk = a_disk()
    good = read_primary(disk)
    array = good.header.entries_lba * 512
    primary = (*range(512, 512 + 92), *range(array, array + 128 * 128))
    last = (BLOCKS - 1) * 512
    for lba, places in ((1, primary), (BLOCKS - 1, range(last, last + 92))):
        for place in places:
            disk[place] ^= 0xFF
            assert is_refused(disk, lba), place
            disk[place] ^= 0xFF
    assert read_primary(disk) == good


# A header's numbers, where they stand, and how.
FIELDS = (
    ("size", 12, "<I"), ("own", 24, "<Q"), ("other", 32, "<Q"), ("first", 40, "<Q"),
    ("last", 48, "<Q"), ("entries", 72, "<Q"), ("count", 80, "<I"), ("bytes", 84, "<I"),
)  # fmt: skip
EXTREMES = (0, 1, 2, 3, 33, 34, 2047, 16350, 16383, 16384, 1 << 31, (1 << 32) - 1)


@pytest.mark.parametrize("lba", [1, BLOCKS - 1])
@pytest.mark.parametrize(("name", "at", "form"), FIELDS, ids=[field[0] for field in FIELDS])
def test_a_header_that_lies_with_the_right_checksum(
    name: str, at: int, form: str, lba: int
) -> None:
    """Whatever it says, what comes of it lies within the disk and not on the table itself."""
    disk = a_disk()
    for value in (*EXTREMES, *((1 << 63, (1 << 64) - 1) if form == "<Q" else ())):
        block = bytearray(disk[lba * 512 : lba * 512 + 512])
        struct.pack_into(form, block, at, value)
        size = min(struct.unpack_from("<I", block, 12)[0], 512)
        block[16:20] = bytes(4)
        struct.pack_into("<I", block, 16, zlib.crc32(block[:size]))
        try:
            found = parse_header(bytes(block), lba, 512, BLOCKS)
        except GptError:
            continue
        assert 0 < found.entries_bytes <= ENTRIES_BYTES_MOST
        entries = range(found.entries_lba, found.entries_lba + -(-found.entries_bytes // 512))
        usable = range(found.first_usable, found.last_usable + 1)
        assert entries.start > 1
        assert entries.stop <= BLOCKS
        assert 1 < usable.start < usable.stop <= BLOCKS
        assert not set(usable) & {lba, *entries}


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (0, 100, "outside"),
        (33, 100, "outside"),
        (5000, 4999, "outside"),
        (8000, 1 << 63, "outside"),
        ((1 << 64) - 1, 2, "outside"),
        (16351, 16351, "outside"),
        (6143, 6143, "overlap"),
        (2048, 2048, "overlap"),
        (2000, 9000, "overlap"),
        (8191, 8192, "overlap"),
    ],
)
def test_an_entry_that_lies(first: int, last: int, said: str) -> None:
    table = read_primary(a_disk())
    entry = struct.pack("<16s16sQQQ72s", SPDK_TYPE.bytes_le, ONE.bytes_le, first, last, 0, b"")
    raw = table.raw_entries[: 6 * 128] + entry + table.raw_entries[7 * 128 :]
    header = dataclasses.replace(table.header, entries_crc=zlib.crc32(raw))
    with pytest.raises(GptError, match=said):
        parse_entries(header, raw)


def test_names_that_are_no_text() -> None:
    table = read_primary(a_disk())
    for name in (b"\x00\xd8" * 36, b"\xff" * 72, b"a\0\0\0b\0"):
        raw = table.raw_entries[:56] + name.ljust(72, b"\0") + table.raw_entries[128:]
        header = dataclasses.replace(table.header, entries_crc=zlib.crc32(raw))
        (one, _two) = parse_entries(header, raw)
        assert len(one.name.encode()) <= 36 * 3


# ---- power cuts ---------------------------------------------------------------------------------


def what_is_found(disk: bytearray) -> Any:
    if not is_protective_mbr(bytes(disk[:512])):
        return None
    try:
        return read_primary(disk).entries
    except GptError:
        return read_secondary(disk).entries


def test_cut_off_at_any_block_the_old_or_the_new_table_is_there() -> None:
    before = a_disk()
    old = read_primary(before)
    table = add_entry(old, Entry(3, SPDK_TYPE, NEW, 8192, 9000, 0, "new"))
    blocks = [
        (offset + at, data[at : at + 512])
        for group in table_writes(table, 512)
        for offset, data in group
        for at in range(0, len(data), 512)
    ]
    for written in range(len(blocks) + 1):
        disk = bytearray(before)
        for offset, data in blocks[:written]:
            disk[offset : offset + 512] = data
        found = what_is_found(disk)
        assert found in (old.entries, table.entries)
    assert found == table.entries
