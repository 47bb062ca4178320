from collections.abc import Mapping
from typing import Final
from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.filter import FilterBdev

LATENCIES: Final[tuple[str, ...]]
MOST_US: Final[int]

class DelayBdev(FilterBdev):
    """``base``, whose reads and writes answer later than it does itself.

    ``latencies`` has microseconds by the names in LATENCIES: avg_read, p99_read,
    avg_write, p99_write.
    """

    def __init__(self, name: str, uuid: UUID, base: Bdev, latencies: Mapping[str, int]) -> None: ...
    @property
    def latencies(self) -> dict[str, int]:
        """What I/O that comes now gets."""

    def set_latency(self, which: str, latency_us: int) -> None:
        """For what completes from now on; what waits keeps its deadline. Raises: UsageError."""
