from drivebay.bdev.lvol.table import ClusterTable

class FreeMap:
    """Free clusters. Control may call everything here while the space is frozen; else only
    ``total``, ``free`` and ``is_used``."""

    def __init__(self, total: int) -> None:
        """All are free, none known to be zero."""

    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    def is_used(self, cluster: int) -> bool: ...
    @property
    def used(self) -> memoryview[int]:
        """A bit a cluster, the lowest of each byte first. recount() after writing to it."""

    @property
    def zeroed(self) -> memoryview[int]:
        """The same: free clusters that are known to read as zeroes."""

    def recount(self) -> None:
        """Count the free clusters after writes to ``used``."""

    def grow(self, total: int) -> None:
        """The new ones are free, and not known to be zero. Raises: StateError for fewer."""

    def allocate(self, table: ClusterTable, first: int, count: int) -> list[tuple[int, int]]:
        """Give every entry of the range that has none a free cluster, the lowest ones.

        Returns the runs (first cluster, count) that are not known to be zero: clear them before
        anybody reads. Saves nothing. Raises: HostError (ENOSPC), nothing is allocated then.
        """

    def release(self, table: ClusterTable, first: int, count: int) -> list[tuple[int, int]]:
        """Take the range's clusters from the table; they are free again. Saves nothing.

        Returns the runs (first cluster, count).
        """

    @property
    def unclear(self) -> bool:
        """Whether somebody got a cluster that had to be cleared first."""

    def next_unclear(self, most: int) -> tuple[int, int]:
        """The first (cluster, count) that are free and not known to be zero, ``most`` at most.

        For control to clear, and to mark_zeroed(). ``unclear`` is False from then on.
        """

    def mark_zeroed(self, cluster: int, count: int) -> None:
        """Free clusters that were cleared, and the clearing flushed."""
