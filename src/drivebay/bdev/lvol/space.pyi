from collections.abc import Callable

from drivebay.bdev.base import Channel
from drivebay.bdev.lvol.free_map import FreeMap
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.reactor.mailbox import Answer

class Space:
    """A store's free space. Context: control; the volumes' first writes go on meanwhile."""

    base: Channel  # on the owner reactor; the maker keeps it open
    free: FreeMap

    def __init__(
        self,
        base: Channel,
        total_clusters: int,
        cluster_bytes: int,
        pages_offset: int,
        page_bytes: int,
        *,
        on_need: Callable[[], None],
        on_full: Callable[[], None],
    ) -> None:
        """All clusters are free, none known to be zero. It begins frozen: fill it, then thaw().

        ``pages_offset``: the byte where metadata page 0 lies. ``on_need``: some first writes
        wait for control (freeze(), serve wants(), thaw()). ``on_full``: told once, until
        clusters are free again. Both run in control and may not block.
        """

    def freeze(self) -> Answer:
        """Begin no allocation; answered when none is in flight. One at a time."""

    def thaw(self, *, barred: bool = False, flushed: bool = False) -> Answer:
        """Go on. What wants() listed and did not get ends with an error, so serve it first.

        ``barred``: what is on disk is not known, so first writes end with an error; each asks
        control first, so that it can try to put it right. ``flushed``: the base was, while
        frozen; so it must be after tables or extent pages have changed.
        """

    @property
    def frozen(self) -> bool: ...
    def close(self) -> Answer:
        """Before its end: no volume may be left that uses it."""

    def wants(self) -> list[tuple[ClusterTable, int, int]]:
        """Frozen only: (table, index, cluster) of the first writes that wait for control.

        Cluster 0: the table has no extent page for the index; write an empty one, and note it
        in table.extent_pages. Other ones: a table of run lengths; the cluster has its content:
        save the volume with it, and call table.set(index, cluster).
        """

    def failed_pages(self) -> list[tuple[ClusterTable, int]]:
        """Frozen only: (table, extent page) where a write failed; write each as its table is.

        Until then first writes end with an error, after they have asked control.
        """

    def forget_failed(self) -> None:
        """Frozen only: they are written, and stable. What they were to name is free again."""

    @property
    def cluster_bytes(self) -> int: ...
    def touch(self, table: ClusterTable, index: int) -> Answer:
        """Allocate one cluster with its content, as a first write would; the answer is 0 or -errno.

        Not while frozen by the same task: it is answered after the thaw.
        """
