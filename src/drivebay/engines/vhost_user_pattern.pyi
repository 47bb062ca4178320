def stamp(buffer: bytearray | memoryview, address: int, sequence: int, run: int) -> None:
    """Fill whole sectors that lie at ``address`` on the disk."""

def check(
    buffer: bytes | bytearray | memoryview, address: int, sequence: int, run: int
) -> tuple[int, int] | None:
    """Offset of the first wrong word and what was expected there, or None."""

def check_any(buffer: bytes | bytearray | memoryview, address: int) -> tuple[int, int] | None:
    """The same when sequence and run are not known: the block must agree with itself."""
