from uuid import UUID

from drivebay.bdev.base import Bdev

class MallocBdev(Bdev):
    """A disk in anonymous memory, zeroes at first."""

    def __init__(self, name: str, uuid: UUID | None, block_size: int, num_blocks: int) -> None:
        """Raises: UsageError for sizes, HostError when address space runs out."""
