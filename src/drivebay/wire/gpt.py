"""GPT on disk: header, entries and protective MBR, read with every check, and made.

Vocabulary only: functions on bytes, no I/O. Everything that is read may be anybody's: lengths,
places and checksums are checked before a number is used, and what fails raises GptError with
a sentence. Source: UEFI specification 2.10, §5.2.3 (protective MBR) and §5.3 (GPT).
Numbers are little-endian; a block is the disk's logical block.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final
from uuid import UUID

from drivebay.errors import DrivebayError

__all__ = [
    "ENTRIES_BYTES_MOST",
    "SPDK_TYPE",
    "SPDK_TYPE_OLD",
    "UNUSED_TYPE",
    "Entry",
    "GptError",
    "Header",
    "Table",
    "add_entry",
    "is_protective_mbr",
    "new_table",
    "pack_protective_mbr",
    "parse_entries",
    "parse_header",
    "parse_table",
    "table_writes",
]

SIGNATURE: Final = b"EFI PART"
UNUSED_TYPE: Final = UUID(int=0)
# What SPDK's vhost takes a partition for, now and in its first releases.
SPDK_TYPE: Final = UUID("6527994e-2c5a-4eec-9613-8f5944074e8b")
SPDK_TYPE_OLD: Final = UUID("7c5222bd-8f5d-4087-9c00-bf9843c7b58c")

# struct EFI_PARTITION_TABLE_HEADER: signature, revision, size, CRC, reserved, own block,
# the other header's block, first and last usable block, disk GUID, first block of the
# entries, their count, their size, their CRC.
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
# struct EFI_PARTITION_ENTRY: type, GUID, first and last block, attributes, name in UTF-16.
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_REVISION: Final = 0x00010000
# The specification sets no bound; 128 entries of 128 bytes are the rule.
ENTRIES_BYTES_MOST: Final = 256 * 1024
_NEW_ENTRIES: Final = 128
_NEW_ENTRIES_BYTES: Final = _NEW_ENTRIES * _ENTRY.size

_MBR_PROTECTIVE: Final = 0xEE
_MBR_SIGNATURE: Final = b"\x55\xaa"
_MBR_RECORD: Final = struct.Struct("<B3sB3sII")


class GptError(DrivebayError):
    """What lies there is no partition table that may be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """One of the two headers; all places are blocks of the disk."""

    own_lba: int
    other_lba: int
    first_usable: int
    last_usable: int
    disk_guid: UUID
    entries_lba: int
    entry_count: int
    entry_bytes: int
    entries_crc: int

    @property
    def entries_bytes(self) -> int:
        """Bytes of all entries together, used or not."""
        return self.entry_count * self.entry_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One partition; ``number`` counts from 1, ``last_lba`` is part of it."""

    number: int
    type_guid: UUID
    unique_guid: UUID
    first_lba: int
    last_lba: int
    attributes: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it stands: the header it was read by, and all of its entries' bytes."""

    header: Header
    entries: tuple[Entry, ...]
    raw_entries: bytes


def is_protective_mbr(block: bytes) -> bool:
    """Whether the disk's first block says that a GPT follows."""
    if block[510:512] != _MBR_SIGNATURE:
        return False
    return any(block[446 + 16 * index + 4] == _MBR_PROTECTIVE for index in range(4))


def parse_header(block: bytes, lba: int, block_bytes: int, blocks: int) -> Header:
    """Read the header that stands in block ``lba`` of a disk of ``blocks`` blocks.

    Raises: GptError.
    """
    if len(block) < _HEADER.size or block[:8] != SIGNATURE:
        raise GptError(f"block {lba} holds no GPT header")
    fields = _HEADER.unpack_from(block)
    _, revision, size, crc, _, own, other, first, last, guid = fields[:10]
    entries, count, entry, entries_crc = fields[10:]
    if not _HEADER.size <= size <= min(block_bytes, len(block)):
        raise GptError(f"the GPT header in block {lba} says that it is {size} bytes long")
    if zlib.crc32(block[:16] + bytes(4) + block[20:size]) != crc:
        raise GptError(f"the checksum of the GPT header in block {lba} is wrong")
    if revision >> 16 != _REVISION >> 16:
        raise GptError(f"the GPT header in block {lba} has the unknown revision {revision:#x}")
    if own != lba:
        raise GptError(f"the GPT header in block {lba} says that it stands in block {own}")
    if entry < _ENTRY.size or entry % 8 or not 0 < count * entry <= ENTRIES_BYTES_MOST:
        raise GptError(f"the GPT header in block {lba} tells of {count} entries of {entry} bytes")
    entries_blocks = -(-count * entry // block_bytes)
    if not (entries >= 2 and entries + entries_blocks <= blocks and 0 < other < blocks):
        raise GptError(
            f"the GPT header in block {lba} names blocks beyond the disk's {blocks}: entries at "
            f"{entries}, the other header at {other}"
        )
    apart = last < entries or entries + entries_blocks <= first
    apart = apart and not first <= own <= last
    if not (2 <= first <= last < blocks and apart):
        raise GptError(
            f"the GPT header in block {lba} gives the blocks {first} to {last} to partitions, of "
            f"{blocks} that the disk has"
        )
    return Header(
        own, other, first, last, UUID(bytes_le=guid), entries, count, entry, entries_crc
    )  # fmt: skip


def parse_entries(header: Header, raw: bytes) -> tuple[Entry, ...]:
    """Read the entries in use, by number. Raises: GptError."""
    if len(raw) < header.entries_bytes:
        raise GptError(f"{len(raw)} bytes are fewer than the table's {header.entries_bytes}")
    if zlib.crc32(raw[: header.entries_bytes]) != header.entries_crc:
        raise GptError(f"the checksum of the GPT entries at block {header.entries_lba} is wrong")
    found = []
    for number in range(1, header.entry_count + 1):
        kind, unique, first, last, attributes, name = _ENTRY.unpack_from(
            raw, (number - 1) * header.entry_bytes
        )
        if not any(kind):
            continue
        if not header.first_usable <= first <= last <= header.last_usable:
            raise GptError(
                f"partition {number} lies in the blocks {first} to {last}, outside of those that "
                f"the table gives to partitions ({header.first_usable} to {header.last_usable})"
            )
        text = name.decode("utf-16-le", errors="replace").partition("\0")[0]
        entry = Entry(
            number, UUID(bytes_le=kind), UUID(bytes_le=unique), first, last, attributes, text
        )
        found.append(entry)
    by_place = sorted(found, key=lambda entry: entry.first_lba)
    for before, after in pairwise(by_place):
        if after.first_lba <= before.last_lba:
            raise GptError(f"the partitions {before.number} and {after.number} overlap")
    return tuple(found)


def parse_table(header: Header, raw_entries: bytes) -> Table:
    """Put a header and the bytes of its entries together. Raises: GptError."""
    entries = parse_entries(header, raw_entries)
    return Table(header, entries, raw_entries[: header.entries_bytes])


def new_table(blocks: int, block_bytes: int, disk_guid: UUID) -> Table:
    """An empty table for a disk. Raises: GptError when the disk is too small for one."""
    entries_blocks = -(-_NEW_ENTRIES_BYTES // block_bytes)
    first, last = 2 + entries_blocks, blocks - 2 - entries_blocks
    if first > last:
        raise GptError(f"{blocks} blocks of {block_bytes} bytes have no room for a GPT")
    raw = bytes(_NEW_ENTRIES_BYTES)
    header = Header(
        1, blocks - 1, first, last, disk_guid, 2, _NEW_ENTRIES, _ENTRY.size, zlib.crc32(raw)
    )  # fmt: skip
    return Table(header, (), raw)


def add_entry(table: Table, entry: Entry) -> Table:
    """The table with one more partition; everything else in it stays as it is, byte for byte.

    Raises: GptError when the number is taken or out of range, or the place is not free.
    """
    header = table.header
    if not 1 <= entry.number <= header.entry_count:
        raise GptError(f"the table has no entry {entry.number}, but {header.entry_count}")
    if any(there.number == entry.number for there in table.entries):
        raise GptError(f"there is a partition {entry.number} already")
    name = entry.name.encode("utf-16-le")
    if len(name) > 72:
        raise GptError(f"the name '{entry.name}' has more than 36 characters")
    packed = _ENTRY.pack(
        entry.type_guid.bytes_le,
        entry.unique_guid.bytes_le,
        entry.first_lba,
        entry.last_lba,
        entry.attributes,
        name,
    )
    start = (entry.number - 1) * header.entry_bytes
    end = start + header.entry_bytes
    raw = table.raw_entries[:start] + packed.ljust(end - start, b"\0") + table.raw_entries[end:]
    return parse_table(replace(header, entries_crc=zlib.crc32(raw)), raw)


def table_writes(table: Table, block_bytes: int) -> tuple[list[tuple[int, bytes]], ...]:
    """What to write, as (offset, bytes): first the copy, then the table that is read first.

    Whoever makes each of the two groups durable before the next one starts has a whole table
    on the disk at any moment. ``table`` is the primary one, whose header stands in block 1.
    Raises: GptError when there is no room for the copy's entries before its header.
    """
    header = table.header
    entries_blocks = -(-header.entries_bytes // block_bytes)
    if header.other_lba - entries_blocks <= header.last_usable:
        raise GptError(
            f"the copy of the table would begin in block {header.other_lba - entries_blocks}, "
            f"where partitions may lie (up to {header.last_usable})"
        )
    copy = replace(
        header,
        own_lba=header.other_lba,
        other_lba=header.own_lba,
        entries_lba=header.other_lba - entries_blocks,
    )
    padded = table.raw_entries.ljust(entries_blocks * block_bytes, b"\0")
    return tuple(
        [
            (one.entries_lba * block_bytes, padded),
            (one.own_lba * block_bytes, _pack_header(one).ljust(block_bytes, b"\0")),
        ]
        for one in (copy, header)
    )


def _pack_header(header: Header) -> bytes:
    def pack(crc: int) -> bytes:
        return _HEADER.pack(
            SIGNATURE,
            _REVISION,
            _HEADER.size,
            crc,
            0,
            header.own_lba,
            header.other_lba,
            header.first_usable,
            header.last_usable,
            header.disk_guid.bytes_le,
            header.entries_lba,
            header.entry_count,
            header.entry_bytes,
            header.entries_crc,
        )

    return pack(zlib.crc32(pack(0)))


def pack_protective_mbr(blocks: int, block_bytes: int) -> bytes:
    """The first block of a disk with a GPT: one record that covers it all."""
    record = _MBR_RECORD.pack(
        0, b"\x00\x02\x00", _MBR_PROTECTIVE, b"\xff\xff\xff", 1, min(blocks - 1, 0xFFFFFFFF)
    )
    return (bytes(446) + record + bytes(48) + _MBR_SIGNATURE).ljust(block_bytes, b"\0")
