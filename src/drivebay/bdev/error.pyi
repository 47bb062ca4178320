from typing import Final
from uuid import UUID

from drivebay.bdev.base import Bdev, Channel
from drivebay.bdev.filter import FilterBdev
from drivebay.reactor.mailbox import Answer

OPERATIONS: Final[tuple[str, ...]]
KINDS: Final[tuple[str, ...]]

class ErrorChannel(Channel):
    def resume(self) -> Answer:
        """Send pending I/O on its way; answered when it has been."""

class ErrorBdev(FilterBdev):
    """``base``, which fails when it is told to."""

    def __init__(self, name: str, uuid: UUID, base: Bdev) -> None: ...
    def inject(
        self,
        operation: str,
        kind: str,
        num: int = 1,
        queue_depth: int = 0,
        corrupt_offset: int = 0,
        corrupt_value: int = 0,
    ) -> None:
        """Let the next ``num`` of one of OPERATIONS fail in one of KINDS."""

    def clear(self, operation: str) -> None:
        """Let one of OPERATIONS fail no more."""

    def clear_pending(self) -> None:
        """Hold nothing more back; what is held stays until its channel resumes."""

    def left(self, operation: str) -> int:
        """How many more will fail."""
