from uuid import UUID

from drivebay.bdev.base import Bdev

class FilterBdev(Bdev):
    """All of ``base``, of its size and with its content; modules subclass it."""

    def __init__(self, name: str, uuid: UUID | None, base: Bdev) -> None:
        """Raises: UsageError for a bad name."""
