"""One open store: its metadata, the free space on the owner reactor, and the volumes' bdevs.

Two locks. ``_changes`` is held for a whole change by one caller at a time, the quiescing of
volumes included. ``_metadata`` is held while metadata is written; a first write that needs
control takes it too, so it is never held while I/O drains. Order: ``_changes``, quiesce,
``_metadata``, freeze.

Context: control.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID, uuid4

from drivebay.bdev.lvol import family, volumes
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.lifelong import lifelong
from drivebay.bdev.lvol.metadata import CLEAR_DEFAULT, CLEAR_UNMAP, CLEAR_ZEROES, Dead, Metadata
from drivebay.bdev.lvol.needs import Needs
from drivebay.bdev.lvol.presence import Presence, claimant
from drivebay.bdev.lvol.volume import Volume
from drivebay.errors import AlreadyExists, DrivebayError, HostError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev, Channel
    from drivebay.bdev.lvol.base_device import BaseDevice
    from drivebay.bdev.lvol.blob import Blob
    from drivebay.bdev.lvol.table import ClusterTable
    from drivebay.bdev.registry import BdevRegistry

__all__ = ["Store"]

_log = logging.getLogger(__name__)

TOUCHES_AT_ONCE: Final = 8
SHOWN_AT_ONCE: Final = 32  # then the loop's other work has a turn


class Store:
    """An lvol store on a base bdev; ``stores.py`` makes and loads them."""

    def __init__(
        self, registry: BdevRegistry, metadata: Metadata, device: BaseDevice, channel: Channel
    ) -> None:
        from drivebay.bdev.lvol.space import Space  # compiled; loaded with the first store

        self.registry = registry
        self.metadata = metadata
        self.base: Bdev = channel.bdev
        self.closed = False
        self._device = device
        self._channel = channel
        self._changes = asyncio.Lock()
        self._metadata = asyncio.Lock()
        self._volumes = {blob.id: Volume(self, blob) for blob in metadata.volumes()}
        sb = metadata.sb
        self.space = Space(
            channel,
            sb.total_clusters,
            sb.cluster_bytes,
            sb.page_offset(0),
            sb.page_bytes,
            on_need=self._note_need,
            on_full=self._note_full,
        )
        self.space.free.used[:] = metadata.free.used
        self.space.free.recount()
        metadata.free = self.space.free
        self._needs = Needs(metadata, self.space)
        self._presence = Presence(self)

    @property
    def name(self) -> str:
        """Its name."""
        return self.metadata.name

    @property
    def uuid(self) -> UUID:
        """Its uuid."""
        return self.metadata.uuid

    @property
    def cluster_bytes(self) -> int:
        """The size of a cluster."""
        return self.metadata.sb.cluster_bytes

    @property
    def block_size(self) -> int:
        """The volumes' block size."""
        return self.metadata.sb.io_unit

    @property
    def total_data_clusters(self) -> int:
        """All clusters but the metadata's."""
        return self.metadata.total_data_clusters

    @property
    def free_clusters(self) -> int:
        """Those that no volume has."""
        return self.metadata.free.free

    @property
    def max_growable(self) -> int:
        """What SPDK says that it can grow to, in bytes."""
        return self.metadata.sb.max_growable

    @property
    def volumes(self) -> list[Volume]:
        """All of them, in the order in which they came."""
        return list(self._volumes.values())

    def __contains__(self, volume: Volume) -> bool:
        return self._volumes.get(volume.blob.id) is volume

    def volume_table(self, blob: Blob) -> ClusterTable:
        """Its table, which is one of the data path here."""
        return cast("ClusterTable", blob.table)

    def volume_of(self, blob: Blob) -> Volume:
        """The volume of a blob."""
        return self._volumes[blob.id]

    def descendants(self, blob: Blob) -> Iterator[Volume]:
        """The volumes that read through it, itself not included. Bound: the volumes."""
        for clone in self.metadata.clones_of(blob):
            yield self.volume_of(clone)
            yield from self.descendants(clone)

    async def start(self, zeroed: bool) -> None:
        """Mark the store unclean and bring its volumes up. Raises: DrivebayError.

        ``zeroed``: all free clusters are known to read as zeroes.
        """
        async with self._changes:
            await self.metadata.open()
            if zeroed:
                self.space.free.mark_zeroed(0, self.space.free.total)
            await self._presence.start()
            await self.space.thaw()
            with self.registry.examining.paused(), lifelong():
                for count, volume in enumerate(self.volumes):
                    self._presence.show(volume)
                    if count % SHOWN_AT_ONCE == 0:
                        await asyncio.sleep(0)

    # What the owner reactor asks for

    def _note_need(self) -> None:
        self.registry.spawn(self._serve())

    def _note_full(self) -> None:
        _log.error(
            "lvol store '%s' is full: first writes to its volumes fail until clusters are free",
            self.name,
        )

    async def _serve(self) -> None:
        async with self._metadata:
            if not self.closed:
                with contextlib.suppress(DrivebayError):  # it was said
                    async with self._frozen():
                        pass  # whoever thaws serves first

    @contextlib.asynccontextmanager
    async def _frozen(self) -> AsyncIterator[None]:
        """With ``_metadata`` held: nothing is allocated. Raises: DrivebayError, as Needs.heal()."""
        await self.space.freeze()
        flushes = self.metadata.flushes
        try:
            await self._needs.heal()
            yield
        finally:
            try:
                await self._needs.serve()
            finally:
                await self.space.thaw(
                    barred=not self.metadata.is_known,
                    flushed=self.metadata.flushes != flushes,
                )

    # Changes

    @contextlib.asynccontextmanager
    async def _change(
        self, volume: Volume | None = None, *, quiet: Iterable[Volume] = ()
    ) -> AsyncIterator[None]:
        """Where metadata may be changed; ``quiet`` do no I/O meanwhile."""
        async with self._changes:
            self._require_open()
            if volume is not None:
                self._require_idle(volume)
            async with self._still(quiet):
                yield

    @contextlib.asynccontextmanager
    async def _still(self, quiet: Iterable[Volume]) -> AsyncIterator[None]:
        """With ``_changes`` held: these do no I/O, and nothing is allocated."""
        async with contextlib.AsyncExitStack() as stack:
            for volume in quiet:
                if volume.bdev is not None:
                    await stack.enter_async_context(self.registry.quiesced(volume.bdev))
            async with self._metadata, self._frozen():
                yield

    def _require_open(self) -> None:
        if self.closed:
            raise StoreError(errno.ENODEV, "the lvol store was closed meanwhile")

    def _require_idle(self, volume: Volume) -> None:
        if volume not in self:
            raise StoreError(errno.ENODEV, "the volume was deleted meanwhile")
        if volume.busy is not None:
            raise StoreError(errno.EBUSY, f"volume '{volume.name}' is being {volume.busy}")

    def _require_free_name(self, name: str) -> None:
        alias = f"{self.name}/{name}"
        if not self.registry.is_free(alias):
            raise AlreadyExists(f"a bdev called '{alias[:160]}' exists already")

    def _arrive(self, blob: Blob) -> Volume:
        volume = self._volumes[blob.id] = Volume(self, blob)
        self._presence.wire(blob)
        self._presence.show(volume)
        _log.info("volume '%s' is here: %s, %d bytes", volume.alias, volume.unique_id, volume.size)
        return volume

    async def create_volume(
        self, name: str, size: int, *, thin: bool = False, clear_method: int = CLEAR_DEFAULT
    ) -> Volume:
        """Make a volume of ``size`` bytes, rounded up to clusters. Raises: DrivebayError."""
        self._require_free_name(name)
        async with self._change():
            blob = await volumes.create(
                self.metadata, name, uuid4(), size, thin=thin, clear_method=clear_method
            )
        return self._arrive(blob)

    async def snapshot(self, volume: Volume, name: str) -> Volume:
        """Make a read-only volume of what it holds now. Raises: DrivebayError."""
        self._require_free_name(name)
        async with self._change(volume, quiet=[volume]):
            blob = await volumes.snapshot(self.metadata, volume.blob, name, uuid4())
            self._presence.wire(blob)
            self._presence.wire(volume.blob)
        return self._arrive(blob)

    async def clone(self, snapshot: Volume, name: str) -> Volume:
        """Make a volume that begins as a snapshot. Raises: DrivebayError."""
        self._require_free_name(name)
        async with self._change(snapshot):
            blob = await volumes.clone(self.metadata, snapshot.blob, name, uuid4())
        return self._arrive(blob)

    async def clone_bdev(self, bdev: Bdev, name: str) -> Volume:
        """Make a volume that begins as another bdev. Raises: DrivebayError."""
        self._require_free_name(name)
        size = bdev.num_blocks * bdev.block_size
        if size % self.cluster_bytes:
            raise StoreError(
                errno.EINVAL,
                f"bdev '{bdev.name}' has {size} bytes, no multiple of the store's clusters of "
                f"{self.cluster_bytes}",
            )
        async with self._change():
            await self._presence.hold(bdev)
            external = str(bdev.uuid).encode() + b"\0"
            blob = await volumes.create(self.metadata, name, uuid4(), size, external=external)
        return self._arrive(blob)

    async def delete(self, volume: Volume) -> None:
        """Delete a volume; a snapshot only with one clone at most. Raises: DrivebayError."""
        metadata = self.metadata
        async with self._changes:
            self._require_open()
            self._require_idle(volume)
            family.check_deletable(metadata, volume.blob)
            await self._presence.hide(volume)
            quiet = list(self.descendants(volume.blob))
            try:
                async with self._still(quiet):
                    dead = await family.delete(metadata, volume.blob)
                    for other in quiet:
                        self._presence.wire(other.blob)
            except DrivebayError:
                self._presence.show(volume)
                raise
            del self._volumes[volume.blob.id]
            _log.info("volume '%s' is deleted", volume.alias)
            await self._presence.drop_unused()
            await self._bury(dead)

    async def _bury(self, dead: Dead) -> None:
        """Clear clusters that nobody reads, then let others have them."""
        try:
            await self.metadata.clear(dead)
        except HostError as error:
            _log.warning("clusters of store '%s' could not be cleared: %s", self.name, error)
            dead = Dead(dead.table, dead.first, CLEAR_DEFAULT, dead.cut)
        else:
            zeroes = dead.clear_method == CLEAR_ZEROES or (
                dead.clear_method in (CLEAR_DEFAULT, CLEAR_UNMAP) and self._device.unmaps_to_zeroes
            )
            if zeroes:
                await self._device.flush()
        async with self._metadata, self._frozen():
            runs = self.metadata.release(dead)
            if zeroes:
                for first, count in runs:
                    self.space.free.mark_zeroed(first, count)

    async def resize(self, volume: Volume, size: int, *, force: bool = False) -> None:
        """Give it another size, rounded up to clusters. Raises: DrivebayError.

        One that is in use shrinks only by ``force``.
        """
        count = volumes.check_resize(self.metadata, volume.blob, size)
        blocks = count * self.cluster_bytes // self.block_size
        bdev = volume.bdev
        if count < volume.table.num_clusters and bdev is not None:
            old = bdev.num_blocks
            await self._presence.settle(volume)
            await self.registry.resize(bdev, blocks, force=force)
            try:
                async with self._change(volume, quiet=[volume]):
                    dead = await volumes.resize(self.metadata, volume.blob, size)
            except DrivebayError:
                await self.registry.resize(bdev, old)
                raise
            if dead is not None:
                async with self._changes:
                    await self._bury(dead)
            return
        async with self._change(volume, quiet=[volume]):
            dead = await volumes.resize(self.metadata, volume.blob, size)
        if dead is not None:
            async with self._changes:
                await self._bury(dead)
        if bdev is not None:
            await self.registry.resize(bdev, blocks)

    async def rename(self, volume: Volume, name: str) -> None:
        """Give it another name. Raises: DrivebayError."""
        if name == volume.name:
            return
        self._require_free_name(name)
        async with self._change(volume):
            await volumes.rename(self.metadata, volume.blob, name)
            self._presence.name(volume)

    async def rename_store(self, name: str) -> None:
        """Give the store another name; stores.py has checked that it is free."""
        async with self._change():
            await volumes.rename_store(self.metadata, name)
            for volume in self.volumes:
                self._presence.name(volume)

    async def set_read_only(self, volume: Volume) -> None:
        """Nobody writes to it any more. Raises: DrivebayError."""
        async with self._change(volume, quiet=[volume]):
            await volumes.set_read_only(self.metadata, volume.blob)
            if volume.bdev is not None:
                volume.bdev.set_readonly(True)

    async def set_parent(self, volume: Volume, parent: Volume) -> None:
        """Have it read what it lacks from another snapshot. Raises: DrivebayError."""
        await self._presence.require_same_bases(volume, parent.external)
        async with self._change(volume, quiet=[volume, *self.descendants(volume.blob)]):
            await family.set_parent(self.metadata, volume.blob, parent.blob)
            self._presence.wire(volume.blob)
        await self._presence.renew(volume)

    async def set_parent_bdev(self, volume: Volume, bdev: Bdev) -> None:
        """The same from another bdev. Raises: DrivebayError."""
        await self._presence.require_same_bases(volume, bdev.uuid)
        size = bdev.num_blocks * bdev.block_size
        async with self._change(volume, quiet=[volume, *self.descendants(volume.blob)]):
            external = str(bdev.uuid).encode() + b"\0"
            family.check_external_parent(self.metadata, volume.blob, external, size)
            await self._presence.hold(bdev)
            await family.set_external_parent(self.metadata, volume.blob, external, size)
            self._presence.wire(volume.blob)
        await self._presence.renew(volume)

    async def inflate(self, volume: Volume) -> None:
        """Give it all clusters; it needs no parent then. Raises: DrivebayError."""
        await self._own_clusters(volume, everything=True)

    async def decouple(self, volume: Volume) -> None:
        """Copy what it reads from its parent, and leave that. Raises: DrivebayError."""
        external = volume.is_esnap_clone
        await self._own_clusters(volume, everything=external)

    async def _own_clusters(self, volume: Volume, *, everything: bool) -> None:
        self._require_idle(volume)
        if not everything or volume.is_esnap_clone:
            family.lacking(self.metadata, volume.blob, everything=everything)
        volume.busy = "inflated" if everything else "decoupled"
        try:
            while lacking := family.lacking(self.metadata, volume.blob, everything=everything):
                await self._touch(volume, lacking)
                if self.closed or volume not in self:
                    raise StoreError(errno.ENODEV, "the volume was deleted meanwhile")
        finally:
            volume.busy = None
        done = family.inflated if everything else family.decoupled
        async with self._change(volume, quiet=[volume, *self.descendants(volume.blob)]):
            await done(self.metadata, volume.blob)
            self._presence.wire(volume.blob)
        await self._presence.renew(volume)

    async def _touch(self, volume: Volume, indexes: list[int]) -> None:
        """Allocate clusters as first writes would, some at a time. Raises: HostError."""
        for start in range(0, len(indexes), TOUCHES_AT_ONCE):
            part = indexes[start : start + TOUCHES_AT_ONCE]
            answers = [self.space.touch(volume.table, index) for index in part]
            codes = [await answer for answer in answers]
            bad = next((code for code in codes if code), 0)
            if bad:
                raise HostError(f"volume '{volume.name}' gets no cluster of its own", -bad)

    async def grow(self) -> None:
        """Take what the base has become larger by. Raises: DrivebayError."""
        async with self._change():
            if await self.metadata.grow():
                _log.info("lvol store '%s' has %d bytes now", self.name, self.metadata.sb.size)

    # External snapshots that come and go

    def misses(self, bdev: Bdev) -> bool:
        """Whether volumes wait for it."""
        return bdev.uuid in self._presence.missing

    async def find_external(self, bdev: Bdev) -> None:
        """It is here again."""
        async with self._changes:
            if not self.closed:
                await self._presence.find_again(bdev)

    async def lose_external(self, uuid: UUID) -> None:
        """It goes; the volumes on it go first."""
        async with self._changes:
            if not self.closed:
                await self._presence.lose(uuid)

    def shown(self, bdev_name: str) -> Volume | None:
        """The volume that a bdev is."""
        return self._presence.shown.get(bdev_name)

    # The end

    async def unload(self) -> None:
        """Take its volumes away and mark it clean; it can be loaded again."""
        async with self._changes:
            if self.closed:
                return
            await self._presence.hide_all()
            async with self._metadata:
                await self.space.freeze()
                try:
                    await self._needs.heal()
                    await self.metadata.close()
                except DrivebayError as error:
                    _log.error("lvol store '%s' could not be closed cleanly: %s", self.name, error)
                await self._let_go()

    async def destroy(self) -> None:
        """Delete the store with all its volumes. Raises: DrivebayError."""
        async with self._changes:
            self._require_open()
            await self._presence.hide_all()
            async with self._metadata:
                await self.space.freeze()
                try:
                    size = max(4096, self._device.block_size)
                    await self._device.write(0, bytes(size))
                    await self._device.flush()
                finally:
                    await self._let_go()

    async def _let_go(self) -> None:
        await self._end()
        self.registry.release(self.base, claimant(self.base))
        await self.registry.close_channel(self._channel)

    async def _end(self) -> None:
        self.closed = True
        await self.space.close()
        await self._presence.stop()

    async def abandon(self) -> None:
        """Take back what a start() did that failed or was cancelled; the base is the caller's."""
        await self._presence.hide_all()
        await self.space.freeze()
        await self._end()
