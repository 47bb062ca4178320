"""SPDK's RAID superblock: one that SPDK wrote, and whatever else may lie in its place."""

from __future__ import annotations

import lzma
import random
import struct
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from drivebay.bdev.raid.superblock import (
    CONFIGURED,
    MISSING,
    Member,
    Superblock,
    checksum,
    encode,
    length_of,
    parse,
)
from drivebay.errors import UsageError

DATA = Path(__file__).parents[1] / "data" / "raid"
CRC_AT = 16


def written_by_spdk(name: str = "raid-m0") -> bytes:
    with lzma.open(DATA / f"{name}.img.xz") as image:
        return image.read(4096)


def made() -> Superblock:
    members = [Member(uuid4(), 2048, 63488, CONFIGURED, slot) for slot in range(3)]
    return Superblock(uuid4(), "md0", 63488, 512, "raid1", 0, 7, 3, members)


def sealed(data: bytearray) -> bytes:
    """With the checksum that makes it look whole."""
    struct.pack_into("<I", data, CRC_AT, 0)
    struct.pack_into("<I", data, CRC_AT, checksum(bytes(data)))
    return bytes(data)


def test_what_spdk_wrote_is_read_and_written_again_to_the_byte() -> None:
    data = written_by_spdk()
    sb = parse(data, "it")
    assert sb is not None
    assert (sb.name, sb.level, sb.seq) == ("md1", "raid1", 1)
    assert sb.uuid == UUID("ed0ccf28-86aa-48de-b1ba-eff51e7c3ccd")
    assert (sb.raid_size, sb.block_size, sb.num_base_bdevs) == (63488, 512, 2)
    assert [member.data_offset for member in sb.members] == [2048, 2048]
    assert encode(sb) == data[: length_of(data, "it")]


def test_the_checksum_is_crc32c_without_inversion() -> None:
    # CRC-32C of "123456789" is 0xe3069283; begun with 0 and not inverted it is this.
    assert checksum(b"123456789") == 0x58E3FA20
    assert checksum(bytes(100)) == 0


def test_one_of_ours_comes_back() -> None:
    sb = made()
    assert parse(encode(sb).ljust(1024, b"\xff"), "it") == sb


@pytest.mark.parametrize("data", [b"", bytes(512), b"SPDKRAI", b"x" * 4096])
def test_no_signature_is_no_superblock(data: bytes) -> None:
    assert parse(data, "it") is None


def test_each_byte_changed_is_refused_or_no_superblock() -> None:
    data = written_by_spdk()[:384]
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            if at < 8:
                assert parse(bytes(changed), "it") is None
                continue
            with pytest.raises(UsageError):
                parse(bytes(changed), "it")


def test_each_byte_changed_under_a_good_checksum_is_refused_or_makes_sense() -> None:
    chance = random.Random(5)
    data = written_by_spdk()[:384]
    for at in range(8, len(data)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)}:
            changed = bytearray(data)
            changed[at] = value
            try:
                sb = parse(sealed(changed), "it")
            except UsageError:
                continue
            assert sb is not None
            check(sb)


def check(sb: Superblock) -> None:
    assert sb.uuid.int
    assert 0 < len(sb.name.encode()) <= 63
    assert sb.block_size in (512 << n for n in range(8))
    assert sb.raid_size > 0
    assert 0 < sb.seq < (1 << 64) - 1
    assert len({member.slot for member in sb.members}) == len(sb.members) <= sb.num_base_bdevs
    assert all(member.slot < sb.num_base_bdevs for member in sb.members)
    for member in sb.members:
        if member.state == CONFIGURED:
            assert member.data_offset * sb.block_size >= 1 << 20
            assert member.data_size
    assert parse(encode(sb), "it") == sb


def test_a_random_rest_ends_as_a_sentence() -> None:
    chance = random.Random(6)
    for length in (8, 255, 256, 300, 16640):
        for _ in range(20):
            data = bytearray(b"SPDKRAID" + chance.randbytes(length))
            if length >= 256 and chance.random() < 0.5:
                struct.pack_into("<HHI", data, 8, 1, 0, 256 + 64 * chance.randrange(4))
            try:
                found = parse(bytes(data), "it")
            except UsageError:
                continue
            assert found is None


def two_states(sb: Superblock) -> Superblock:
    sb.members[1].state = MISSING
    sb.members[1].uuid = UUID(int=0)
    return sb


def test_an_empty_slot_needs_no_uuid() -> None:
    sb = two_states(made())
    assert parse(encode(sb), "it") == sb


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (replace(made(), uuid=UUID(int=0)), "no uuid"),
        (replace(made(), block_size=513), "block size"),
        (replace(made(), strip_size=8), "strip"),
        (replace(made(), level="raid0"), "strip"),
        (replace(made(), level="concat", strip_size=3), "strip"),
        (replace(made(), raid_size=0), "size of 0"),
        (replace(made(), raid_size=1 << 60), "size of"),
        (replace(made(), seq=0), "sequence"),
        (replace(made(), seq=(1 << 64) - 1), "sequence"),
        (replace(made(), num_base_bdevs=2), "members"),
        (replace(made(), members=[]), "members"),
        (replace(made(), members=[Member(uuid4(), 2048, 1, MISSING, 0)]), "no member"),
        (replace(made(), members=[Member(uuid4(), 2048, 1, 9, 0)]), "state"),
        (replace(made(), members=[Member(uuid4(), 2047, 1, CONFIGURED, 0)]), "own bytes"),
        (replace(made(), members=[Member(uuid4(), 2048, 0, CONFIGURED, 0)]), "size of a member"),
        (replace(made(), members=[Member(UUID(int=0), 2048, 1, CONFIGURED, 0)]), "without its"),
        (replace(made(), members=[Member(UUID(int=5), 2048, 1, 1, 0)] * 2), "twice"),
    ],
)  # fmt: skip
def test_contradictions_are_named(wrong: Superblock, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(encode(wrong), "bdev 'M'")
