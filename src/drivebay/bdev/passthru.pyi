from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.filter import FilterBdev

class PassthruBdev(FilterBdev):
    """Hands every I/O on to ``base``."""

    def __init__(self, name: str, uuid: UUID | None, base: Bdev) -> None: ...
