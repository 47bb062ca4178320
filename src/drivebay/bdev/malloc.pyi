from uuid import UUID

from drivebay.bdev.base import Bdev

class MallocBdev(Bdev):
    """A disk in anonymous memory, zeroes at first. Blocking to make: it takes its memory."""

    def __init__(self, name: str, uuid: UUID | None, block_size: int, num_blocks: int) -> None:
        """Raises: UsageError for sizes, HostError when there is not so much memory."""

def available_memory() -> int:
    """Bytes that can be taken without swapping."""
