from typing import Final
from uuid import UUID

from drivebay.bdev.base import Bdev

class PartBdev(Bdev):
    """``num_blocks`` blocks of ``base`` from ``offset_blocks`` on; split and gpt subclass it."""

    offset_blocks: Final[int]

    def __init__(
        self, name: str, uuid: UUID, base: Bdev, offset_blocks: int, num_blocks: int
    ) -> None:
        """Raises: UsageError when the base has no such blocks."""
