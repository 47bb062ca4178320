from collections.abc import Callable
from typing import Any
from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.lvol.space import Space
from drivebay.bdev.lvol.table import ClusterTable as ClusterTable

class LvolBdev(Bdev):
    """A logical volume. Context: control.

    Its size is that of its table, whole clusters; grow the table first, then
    registry.resize(), both while it is quiesced.
    """

    space: Space

    def __init__(
        self,
        name: str,
        uuid: UUID | None,
        space: Space,
        table: ClusterTable,
        external: Bdev | None = None,
        *,
        readonly: bool = False,
        describe: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Stands on space.base's bdev and, with it, on ``external``: the snapshot from elsewhere
        that its table's chain ends in.

        ``describe`` gives the "lvol" object of bdev_get_bdevs.
        """

    @property
    def table(self) -> ClusterTable: ...
    def set_table(self, table: ClusterTable) -> None:
        """Read and write through another one. While it is quiesced."""

    def set_readonly(self, readonly: bool) -> None:
        """While it is quiesced."""
