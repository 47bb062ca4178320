"""All lvol stores of a target: made, found on bdevs that come, and closed.

Context: control.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING
from uuid import uuid4

from drivebay.bdev.claims import ONE_WRITER
from drivebay.bdev.lvol import creation, layout
from drivebay.bdev.lvol.base_device import BaseDevice
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.lifelong import forgotten, lifelong
from drivebay.bdev.lvol.load import load, read_super
from drivebay.bdev.lvol.metadata import CLEAR_UNMAP, CLEAR_ZEROES, Metadata
from drivebay.bdev.lvol.presence import claimant
from drivebay.bdev.lvol.store import Store
from drivebay.bdev.lvol.volume import Volume
from drivebay.bdev.lvol.volumes import check_name
from drivebay.errors import AlreadyExists, DrivebayError, NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev, Channel
    from drivebay.bdev.lvol.blob import Table
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["Stores"]

_log = logging.getLogger(__name__)


def _make_table(num_clusters: int, blob_id: int, extent_table: bool) -> Table:
    from drivebay.bdev.lvol.table import ClusterTable  # compiled; loaded with the first store

    return ClusterTable(num_clusters, blob_id, extent_table=extent_table)


class Stores:
    """The open stores, in the order in which they came."""

    def __init__(self, registry: BdevRegistry, owner: Callable[[], Reactor]) -> None:
        self._registry = registry
        self._owner = owner
        self._stores: list[Store] = []
        self._names: set[str] = set()  # of stores that are being made or loaded

    def __iter__(self) -> Iterator[Store]:
        return iter(list(self._stores))

    def find(self, name: str | None = None, uuid: str | None = None) -> Store | None:
        """The store of that name or uuid."""
        for store in self._stores:
            if name == store.name or (uuid is not None and uuid.lower() == str(store.uuid)):
                return store
        return None

    def volume(self, name: str) -> Volume:
        """The volume of that name (store/volume) or uuid. Raises: NotFound."""
        with contextlib.suppress(NotFound):
            bdev_name = self._registry.get(name).name
            for store in self._stores:
                found = store.shown(bdev_name)
                if found is not None:
                    return found
        for store in self._stores:
            for volume in store.volumes:
                if volume.is_degraded and name in (volume.alias, volume.unique_id):
                    return volume
        raise NotFound(
            f"no logical volume is called '{name[:160]}'", hint="list them with bdev_lvol_get_lvols"
        )

    # Coming

    async def examine(self, bdev: Bdev) -> None:
        """Open the store on a bdev, if there is one: registry.examining.on_examine().

        A damaged one is named in the log and stays closed.
        """
        owner = self._owner()
        try:
            async with self._registry.access(bdev, owner) as access:
                head = await access.read(0, max(layout.PAGE, bdev.block_size))
        except (DrivebayError, ValueError) as error:
            _log.debug("bdev '%s' can't be looked into: %s", bdev.name, error)
            return
        if not layout.is_super_block(head):
            return
        try:
            await self.load(bdev)
        except DrivebayError as error:
            level = logging.INFO if error.errno == errno.ENXIO else logging.ERROR
            _log.log(level, "bdev '%s' holds a store that stays closed: %s", bdev.name, error)

    async def arrived(self, bdev: Bdev) -> None:
        """Volumes may have waited for a bdev: registry.examining.on_arrival()."""
        for store in self:
            if store.misses(bdev):
                await store.find_external(bdev)

    async def load(self, bdev: Bdev) -> Store:
        """Open the store on a bdev. Raises: DrivebayError; nothing has been written then."""
        if bdev.readonly:
            raise StoreError(
                errno.EROFS, f"bdev '{bdev.name}' is read-only; a store must be written"
            )
        async with self._claimed(bdev) as (device, channel):
            await read_super(device)
            metadata = await load(device, _make_table)
            with self._reserved(metadata.name):
                return await self._open(metadata, device, channel, zeroed=False)

    async def create(
        self,
        bdev: Bdev,
        name: str,
        *,
        cluster_bytes: int = 0,
        pages_percent: int = 0,
        page_bytes: int = 0,
        clear_method: int = CLEAR_UNMAP,
    ) -> Store:
        """Make a store on a bdev; what was there is lost. Raises: DrivebayError."""
        check_name(name, "a store")
        sb = creation.plan(
            bdev.num_blocks * bdev.block_size,
            bdev.block_size,
            cluster_bytes=cluster_bytes,
            pages_percent=pages_percent,
            page_bytes=page_bytes,
        )
        with self._reserved(name):
            async with self._claimed(bdev) as (device, channel):
                metadata = await creation.create_store(
                    device, _make_table, name, uuid4(), sb, clear_method
                )
                zeroed = clear_method == CLEAR_ZEROES or (
                    clear_method == CLEAR_UNMAP and device.unmaps_to_zeroes
                )
                return await self._open(metadata, device, channel, zeroed=zeroed)

    @contextlib.contextmanager
    def _reserved(self, name: str) -> Iterator[None]:
        self._require_free(name)
        self._names.add(name)
        try:
            yield
        finally:
            self._names.discard(name)

    def _require_free(self, name: str) -> None:
        if name in self._names or self.find(name) is not None:
            raise AlreadyExists(f"an lvol store called '{name[:80]}' exists already")

    @contextlib.asynccontextmanager
    async def _claimed(self, bdev: Bdev) -> AsyncIterator[tuple[BaseDevice, Channel]]:
        """A bdev taken for a store; given back when that fails."""
        from drivebay.bdev.access import Access  # compiled; loaded when first needed

        by = claimant(bdev)
        self._registry.claim(bdev, by, ONE_WRITER)
        channel: Channel | None = None
        try:
            channel = await self._registry.open_channel(bdev, self._owner())
            yield BaseDevice(Access(channel)), channel
        except BaseException:
            if channel is not None:
                await self._registry.close_channel(channel)
            self._registry.release(bdev, by)
            raise

    async def _open(
        self, metadata: Metadata, device: BaseDevice, channel: Channel, *, zeroed: bool
    ) -> Store:
        with lifelong():
            store = Store(self._registry, metadata, device, channel)
        self._stores.append(store)
        try:
            await store.start(zeroed)
        except BaseException:
            self._stores.remove(store)
            await store.abandon()
            raise
        self._registry.subscribe(store.base, self._base_event)
        _log.info(
            "lvol store '%s' on '%s': %d volumes, %d of %d clusters of %d bytes free",
            store.name,
            store.base.name,
            len(store.volumes),
            store.free_clusters,
            store.total_data_clusters,
            store.cluster_bytes,
        )
        return store

    # Changing and going

    async def rename(self, store: Store, name: str) -> None:
        """Give a store another name. Raises: DrivebayError."""
        if name == store.name:
            return
        check_name(name, "a store")
        with self._reserved(name):
            await store.rename_store(name)

    async def destroy(self, store: Store) -> None:
        """Delete a store with all its volumes. Raises: DrivebayError."""
        self._forget(store)
        await store.destroy()
        _log.info("lvol store '%s' on '%s' is deleted", store.name, store.base.name)
        forgotten()

    async def close(self) -> None:
        """Close all of them cleanly, the newest first: one may stand on another's volume."""
        for store in reversed(list(self._stores)):
            await self._close(store)

    async def _close(self, store: Store) -> None:
        self._forget(store)
        await store.unload()
        _log.info("lvol store '%s' on '%s' is closed", store.name, store.base.name)
        forgotten()

    def _forget(self, store: Store) -> None:
        if store not in self._stores:
            raise NotFound(f"lvol store '{store.name}' is being closed")
        self._stores.remove(store)
        self._registry.unsubscribe(store.base, self._base_event)

    async def _base_event(self, bdev: Bdev, event: str) -> None:
        """The base goes: its store is closed while it still can be written."""
        if event != "remove":
            return
        for store in self:
            if store.base is bdev:
                await self._close(store)
