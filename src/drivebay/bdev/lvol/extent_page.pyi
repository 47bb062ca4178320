from collections.abc import Mapping
from typing import Any

from drivebay.bdev.lvol.table import ClusterTable

def draw(
    table: ClusterTable, page: int, num_clusters: int, added: Mapping[int, int] | None = None
) -> bytes:
    """The 4,096 bytes of a table's extent page, as if it had ``num_clusters`` clusters.

    All that the table has is stable on disk already, or will be before the page counts;
    ``added``: what comes to it by this write.
    """

def seal(image: Any) -> bytes:
    """The same page with a seal; all of its entries are stable. Only its last block changes."""

def is_sealed(image: Any) -> bool:
    """Whether the page can be mended after the next write in place is torn."""

def mend(image: Any) -> bytes | None:
    """What a page with a wrong checksum should be, if a torn write in place explains it.

    It has all entries that were stable, and maybe some of those that were on their way.
    """
