"""What first writes need of control: extent pages, saved run lengths, clear clusters, and failed
writes put right.

Context: control; the space is frozen.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

from drivebay.bdev.lvol import family
from drivebay.bdev.lvol.blob import extent_page_count
from drivebay.bdev.lvol.layout import ENTRIES_A_PAGE
from drivebay.errors import DrivebayError

if TYPE_CHECKING:
    from drivebay.bdev.lvol.metadata import Metadata
    from drivebay.bdev.lvol.space import Space
    from drivebay.bdev.lvol.table import ClusterTable

__all__ = ["Needs"]

_log = logging.getLogger(__name__)

AHEAD: Final = 8  # extent pages that are made at once
SCARCE: Final = 4  # more than this part of the free pages is not spent on it
CLEAR_BYTES: Final = 32 << 20  # that are cleared at once; first writes wait meanwhile


class Needs:
    """Those of one store."""

    def __init__(self, metadata: Metadata, space: Space) -> None:
        self._metadata = metadata
        self._space = space
        self._told = False  # that writes fail
        self._clears = True  # until the base could not

    async def heal(self) -> None:
        """Write again what failed writes left unknown. Raises: DrivebayError."""
        failed = self._space.failed_pages()
        if not failed and self._metadata.is_known:
            return
        blobs = self._metadata.blobs
        try:
            await self._metadata.heal([(blobs[table.blob_id], page) for table, page in failed])
        except DrivebayError as error:
            if not self._told:
                _log.error("first writes in store '%s' fail: %s", self._metadata.name, error)
            self._told = True
            raise
        self._space.forget_failed()
        self._told = False
        _log.warning(
            "a write of the metadata of store '%s' had failed: it is repeated", self._metadata.name
        )

    async def serve(self) -> None:
        """Give those who wait what they need; who gets nothing learns it from the thaw."""
        if self._space.failed_pages() or not self._metadata.is_known:
            return
        pages: dict[int, set[int]] = {}
        clusters: dict[int, dict[int, int]] = {}
        tables: dict[int, ClusterTable] = {}
        for table, index, cluster in self._space.wants():
            tables[table.blob_id] = table
            if cluster:
                clusters.setdefault(table.blob_id, {})[index] = cluster
            else:
                pages.setdefault(table.blob_id, set()).add(index // ENTRIES_A_PAGE)
        for blob_id, wanted in pages.items():
            wanted |= self._following(tables[blob_id], wanted)
        for blob_id, table in tables.items():
            blob = self._metadata.blobs.get(blob_id)
            if blob is None or blob.table is not table:
                continue
            try:
                if blob_id in pages:
                    await family.add_extent_pages(self._metadata, blob, pages[blob_id])
                if blob_id in clusters:
                    await family.save_clusters(self._metadata, blob, clusters[blob_id])
                    for index, cluster in clusters[blob_id].items():
                        table.set(index, cluster)
            except DrivebayError as error:
                _log.error("a first write to volume '%s' fails: %s", blob.name, error)
        if self._space.free.unclear and self._clears and self._metadata.is_known:
            await self._clear_ahead()

    async def _clear_ahead(self) -> None:
        """Clear the free clusters that are next, with one flush for all of them.

        Of a store that was loaded nobody knows what its free clusters hold. Whoever gets one that
        is not clear has to clear and flush it first.
        """
        size = self._space.cluster_bytes
        first, count = self._space.free.next_unclear(max(CLEAR_BYTES // size, 1))
        if count == 0:
            return
        device = self._metadata.device
        try:
            await device.write_zeroes(first * size, count * size, may_unmap=True)
        except DrivebayError as error:
            _log.info("store '%s' clears clusters one by one: %s", self._metadata.name, error)
            self._clears = False
            return
        with contextlib.suppress(DrivebayError):  # first writes fail now, and say so
            await self._metadata.flush()
            self._space.free.mark_zeroed(first, count)

    def _following(self, table: ClusterTable, wanted: set[int]) -> set[int]:
        """The pages behind those that are wanted, unless pages are scarce.

        All first writes wait while control makes a page; a volume that is written from its
        beginning to its end needs these next.
        """
        end = extent_page_count(table.num_clusters)
        found = {page for first in wanted for page in range(first, min(first + AHEAD, end))}
        return found if len(found) <= self._metadata.free_page_count() // SCARCE else set()
