"""CRC-32C against the values of RFC 3720, B.4, by the instruction and by the table."""

from __future__ import annotations

import pytest

from drivebay.memory.crc32c import crc32c, crc32c_by_table

KNOWN = [
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize(("data", "value"), KNOWN)
def test_known_values(data: bytes, value: int) -> None:
    assert crc32c(data) == value
    assert crc32c_by_table(data) == value


def test_a_value_goes_on_where_it_ended() -> None:
    data = bytes(i * 7 & 255 for i in range(4092))
    whole = crc32c_by_table(data)
    for cut in (0, 1, 7, 8, 9, 4091, 4092):
        assert crc32c(data[cut:], crc32c(data[:cut])) == whole
