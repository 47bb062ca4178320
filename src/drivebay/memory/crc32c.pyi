from typing import Any

def crc32c(data: Any, value: int = 0) -> int:
    """CRC-32C of bytes-like ``data``; ``value`` is that of what comes before it.

    crc32c(b"123456789") is 0xE3069283.
    """

def crc32c_by_table(data: Any) -> int:
    """The same from a table, as processors without the instruction do it. For tests."""
