"""The pattern by which verification tells what is wrong with a block."""

from __future__ import annotations

import random
import struct

import pytest

from drivebay.engines.vhost_user_pattern import check, check_any, stamp

RUN = 0xFEED_FACE_CAFE_BEEF
ADDRESS = 7 << 30


def stamped(address: int = ADDRESS, sequence: int = 3, length: int = 4096) -> bytearray:
    block = bytearray(length)
    stamp(block, address, sequence, RUN)
    return block


def test_what_was_stamped_is_right() -> None:
    assert check(stamped(), ADDRESS, 3, RUN) is None
    assert check_any(stamped(), ADDRESS) is None


def test_words_of_each_sector_say_where_it_belongs() -> None:
    block = stamped()
    for sector in range(8):
        magic, address, sequence, run = struct.unpack_from("<8sQQQ", block, 512 * sector)
        assert (magic, address) == (b"DRIVEBAY", ADDRESS + 512 * sector)
        assert (sequence, run) == (3, RUN)


def test_a_lost_write_shows_its_old_sequence() -> None:
    assert check(stamped(sequence=2), ADDRESS, 3, RUN) == (16, 3)


def test_a_misplaced_write_shows_its_own_address() -> None:
    block = stamped(ADDRESS + 4096)
    assert check(block, ADDRESS, 3, RUN) == (8, ADDRESS)
    assert check_any(block, ADDRESS) == (8, ADDRESS)


def test_another_run_is_told_apart() -> None:
    block = bytearray(512)
    stamp(block, ADDRESS, 3, 1)
    assert check(block, ADDRESS, 3, RUN) == (24, RUN)


def test_a_torn_block_is_found_even_when_its_sequence_is_unknown() -> None:
    block = stamped(sequence=4)
    block[2048:] = stamped(sequence=5)[2048:]
    assert check(block, ADDRESS, 4, RUN) == (2048 + 16, 4)
    assert check_any(block, ADDRESS) == (2048 + 16, 4)


def test_zeroes_are_wrong() -> None:
    found = check(bytes(4096), ADDRESS, 3, RUN)
    assert found is not None
    assert found[0] == 0


def test_every_flipped_bit_is_found_in_its_word() -> None:
    rng = random.Random(1)
    good = stamped(length=1024)
    for _ in range(500):
        bit = rng.randrange(8 * 1024)
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        at = bit // 8 // 8 * 8
        expected = int.from_bytes(good[at : at + 8], "little")
        assert check(bad, ADDRESS, 3, RUN) == (at, expected)


@pytest.mark.parametrize("other", [(ADDRESS + 512, 3), (ADDRESS, 4)])
def test_patterns_of_different_sectors_share_no_word(other: tuple[int, int]) -> None:
    one = struct.unpack_from("<60Q", stamped(), 32)
    two = struct.unpack_from("<60Q", stamped(*other), 32)
    assert len(set(one) | set(two)) == 120
