"""SPDK's RAID superblock: 256 bytes and 64 for each member, at the start of every member.

    struct raid_bdev_superblock {          struct raid_bdev_sb_base_bdev {
        uint8_t  signature[8];                 uint8_t  uuid[16];
        uint16_t major, minor;                 uint64_t data_offset;   // blocks
        uint32_t length;                       uint64_t data_size;
        uint32_t crc;                          uint32_t state;
        uint32_t flags;                        uint32_t flags;
        uint8_t  uuid[16];                     uint8_t  slot;
        uint8_t  name[64];                     uint8_t  reserved[23];
        uint64_t raid_size;                };
        uint32_t block_size, level;
        uint32_t strip_size;  // blocks
        uint32_t state;
        uint64_t seq_number;
        uint8_t  num_base_bdevs;
        uint8_t  reserved[118];
        uint8_t  base_bdevs_size;
    };

What is read here was written by anybody: every field is checked before it is believed.
Context: any; no I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from drivebay.errors import UsageError

__all__ = [
    "CONFIGURED",
    "FAILED",
    "LEVELS",
    "MISSING",
    "SIGNATURE",
    "Member",
    "Superblock",
    "checksum",
    "encode",
    "length_of",
    "parse",
]

SIGNATURE: Final = b"SPDKRAID"
MISSING, CONFIGURED, FAILED, SPARE = range(4)
LEVELS: Final = {0: "raid0", 1: "raid1", 0x5F: "raid5f", 99: "concat"}
LEAST_DATA_OFFSET: Final = 1 << 20  # bytes

_HEADER = struct.Struct("<8sHHIII16s64sQIIIIQB118sB")
_MEMBER = struct.Struct("<16sQQIIB23s")
_MAJOR: Final = 1
_CRC_AT: Final = 16
_LENGTH_AT: Final = 12
_MOST_BYTES: Final = _HEADER.size + 255 * _MEMBER.size


@dataclass(slots=True)
class Member:
    """One member as the superblock lists it; a slot without a bdev has a null uuid."""

    uuid: UUID
    data_offset: int  # blocks
    data_size: int
    state: int
    slot: int


@dataclass(slots=True)
class Superblock:
    """What a RAID bdev is; ``seq`` is higher the newer it is."""

    uuid: UUID
    name: str
    raid_size: int  # blocks
    block_size: int
    level: str
    strip_size: int  # blocks
    seq: int
    num_base_bdevs: int
    members: list[Member] = field(default_factory=list)
    minor: int = 0

    def member_of(self, uuid: UUID) -> Member | None:
        """The entry of the bdev with this uuid."""
        return next((member for member in self.members if member.uuid == uuid), None)

    def member_at(self, slot: int) -> Member | None:
        """The entry of one slot."""
        return next((member for member in self.members if member.slot == slot), None)


def checksum(data: bytes | bytearray) -> int:
    """CRC-32C as SPDK keeps it here: it begins with 0 and is not inverted."""
    from drivebay.memory.crc32c import crc32c  # compiled; loaded when needed

    return crc32c(data, 0xFFFFFFFF) ^ 0xFFFFFFFF


def encode(sb: Superblock) -> bytes:
    """The bytes of a superblock, with its checksum."""
    members = b"".join(
        _MEMBER.pack(m.uuid.bytes, m.data_offset, m.data_size, m.state, 0, m.slot, b"")
        for m in sb.members
    )
    level = next(number for number, name in LEVELS.items() if name == sb.level)
    header = _HEADER.pack(
        SIGNATURE,
        _MAJOR,
        sb.minor,
        _HEADER.size + len(members),
        0,
        0,
        sb.uuid.bytes,
        sb.name.encode(),
        sb.raid_size,
        sb.block_size,
        level,
        sb.strip_size,
        0,
        sb.seq,
        sb.num_base_bdevs,
        b"",
        len(sb.members),
    )
    data = bytearray(header + members)
    struct.pack_into("<I", data, _CRC_AT, checksum(data))
    return bytes(data)


def length_of(start: bytes, where: str) -> int:
    """How long the superblock is that begins with these bytes; 0 when there is none.

    Raises: UsageError when it can't have the length that it says.
    """
    if len(start) < _HEADER.size or not start.startswith(SIGNATURE):
        return 0
    length: int = struct.unpack_from("<I", start, _LENGTH_AT)[0]
    whole = _HEADER.size <= length <= _MOST_BYTES
    if not whole or (length - _HEADER.size) % _MEMBER.size:
        raise UsageError(f"the RAID superblock on {where} has an impossible length, {length}")
    return length


def parse(data: bytes, where: str) -> Superblock | None:
    """The superblock in ``data``, which begins with it; None when there is none.

    Raises: UsageError, which says what is wrong with the one that is there.
    """
    length = length_of(data, where)
    if length == 0:
        return None

    def refuse(what: str) -> UsageError:
        return UsageError(f"the RAID superblock on {where} {what}")

    if length > len(data):
        raise refuse("is longer than the bdev")
    (_, major, minor, _, crc, flags, uuid, name, raid_size, block_size, level, strip_size, _,
     seq, num_base_bdevs, _, count) = _HEADER.unpack_from(data)  # fmt: skip
    blank = data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 : length]
    if checksum(blank) != crc:
        raise refuse("has a wrong checksum")
    if major != _MAJOR:
        raise refuse(f"has format {major}.{minor}; known is {_MAJOR}")
    if flags:
        raise refuse(f"needs features that are not known here (flags {flags:#x})")
    if _HEADER.size + count * _MEMBER.size != length:
        raise refuse(f"lists {count} members in {length} bytes")
    sb = Superblock(
        uuid=UUID(bytes=uuid),
        name=_name(name, refuse(f"has a name that is no name, {name[:64]!r}")),
        raid_size=raid_size,
        block_size=block_size,
        level=LEVELS.get(level, f"level {level}"),
        strip_size=strip_size,
        seq=seq,
        num_base_bdevs=num_base_bdevs,
        minor=minor,
    )
    for number in range(count):
        entry = _MEMBER.unpack_from(data, _HEADER.size + number * _MEMBER.size)
        if entry[4]:
            raise refuse(f"needs features that are not known here (flags {entry[4]:#x})")
        sb.members.append(Member(UUID(bytes=entry[0]), entry[1], entry[2], entry[3], entry[5]))
    wrong = _contradiction(sb)
    if wrong:
        raise refuse(wrong)
    return sb


def _name(raw: bytes, error: UsageError) -> str:
    try:
        name = raw[: raw.index(0)].decode()
    except ValueError:
        raise error from None
    if not name or not name.isprintable():
        raise error
    return name


def _contradiction(sb: Superblock) -> str | None:
    """What a superblock says that can't be, if anything."""
    if not sb.uuid.int:
        return "has no uuid"
    size = sb.block_size
    if not 512 <= size <= 65536 or size & (size - 1):
        return f"names an impossible block size, {size}"
    if sb.level not in LEVELS.values():
        return f"names an unknown RAID {sb.level}"
    striped = sb.level != "raid1"
    if striped != (sb.strip_size > 0) or sb.strip_size & (sb.strip_size - 1):
        return f"names an impossible strip of {sb.strip_size} blocks for {sb.level}"
    if not 0 < sb.raid_size < (1 << 63) // size:
        return f"names an impossible size of {sb.raid_size} blocks"
    if not 0 < sb.seq < (1 << 64) - 1:
        return f"has an impossible sequence number, {sb.seq}"
    if not 0 < len(sb.members) <= sb.num_base_bdevs:
        return f"lists {len(sb.members)} members of {sb.num_base_bdevs}"
    return _contradiction_of_members(sb)


def _contradiction_of_members(sb: Superblock) -> str | None:
    slots, uuids = set(), set()
    for member in sb.members:
        if member.slot >= sb.num_base_bdevs or member.slot in slots:
            return f"lists slot {member.slot} twice, or beyond {sb.num_base_bdevs} slots"
        if member.state > SPARE:
            return f"names an unknown state of a member, {member.state}"
        if member.uuid in uuids or (member.state == CONFIGURED and not member.uuid.int):
            return "lists a member twice, or without its uuid"
        if member.uuid.int:
            uuids.add(member.uuid)
        slots.add(member.slot)
        if member.state != CONFIGURED:
            continue
        if member.data_offset * sb.block_size < LEAST_DATA_OFFSET:
            return f"places data in its own bytes, at block {member.data_offset}"
        if not member.data_size or member.data_offset + member.data_size >= 1 << 54:
            return f"names an impossible size of a member, {member.data_size} blocks"
    if not any(member.state == CONFIGURED for member in sb.members):
        return "lists no member that has the data"
    return None
