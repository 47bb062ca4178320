from collections.abc import Sequence
from typing import NamedTuple

GRANULARITY_MOST: int

class Layout(NamedTuple):
    """Which values have which bucket; ``operation`` is an index of OPERATIONS, -1: all."""

    granularity: int
    min_range: int
    max_range: int
    operation: int

def layout_of(granularity: int, least: int, most: int, operation: int = -1) -> Layout:
    """The layout for values from ``least`` on and below ``most``, in ticks.

    Raises: UsageError.
    """

class Histogram:
    layout: Layout

    def __init__(self, layout: Layout) -> None: ...
    def add(self, other: Histogram) -> None:
        """Count what the other one counted too; both have the same layout."""

    def counts(self) -> bytes:
        """All buckets, each as 64 bits in the host's order."""

    def counted_up_to(self, borders: Sequence[int]) -> list[int]:
        """How many lie in buckets that begin at or below each border, and last how many at all.

        Borders are ticks, in rising order.
        """
