from uuid import UUID

from drivebay.bdev.base import Bdev

class NullBdev(Bdev):
    """Reads leave the buffer as it is, writes vanish: for measuring all but the disk."""

    def __init__(self, name: str, uuid: UUID | None, block_size: int, num_blocks: int) -> None:
        """Raises: UsageError for sizes."""
