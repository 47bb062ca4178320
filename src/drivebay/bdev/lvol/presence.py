"""What a store shows to the rest of the target: its volumes' bdevs, and what they stand on.

A volume whose chain of parents ends in another bdev (an external snapshot) has a bdev only while
that one is there; the store claims it for reading and keeps a channel of it on its owner reactor,
to copy from. Context: control.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final
from uuid import UUID

from drivebay.bdev.claims import READERS
from drivebay.bdev.in_slices import in_slices
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.volume import Volume, external_uuid
from drivebay.errors import DrivebayError, NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev, Channel
    from drivebay.bdev.lvol.blob import Blob
    from drivebay.bdev.lvol.store import Store

__all__ = ["Presence", "claimant"]

_log = logging.getLogger(__name__)

WIRED_AT_ONCE: Final = 256  # then the loop's other work has a turn


def claimant(base: Bdev) -> str:
    """In whose name a store claims bdevs: that of its base, which never changes."""
    return f"lvol store on '{base.name}'"


def _stands_on(bdev: Bdev, base: Bdev) -> bool:
    return bdev is base or any(
        below is not None and _stands_on(below, base) for below in bdev.bases
    )


class Presence:
    """The bdevs of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registry = store.registry
        self._externals: dict[UUID, Channel] = {}  # on the owner reactor
        self.by = claimant(store.base)
        self.shown: dict[str, Volume] = {}  # by the name of the bdev
        self.missing: set[UUID] = set()  # external snapshots that are not here

    async def start(self) -> None:
        """Hold the external snapshots that are here, and connect all tables."""
        wanted = {
            uuid
            for volume in self._store.volumes
            if volume.blob.external_id is not None
            and (uuid := external_uuid(volume.blob.external_id)) is not None
        }
        for uuid in wanted:
            try:
                await self.hold(self._registry.get(str(uuid)))
            except DrivebayError as error:
                _log.warning("the external snapshot %s can't be used: %s", uuid, error)
                self.missing.add(uuid)
        async for volume in in_slices(self._store.volumes, WIRED_AT_ONCE):
            self.wire(volume.blob)

    async def stop(self) -> None:
        """Let go of everything; no volume is shown any more."""
        for uuid in list(self._externals):
            await self._drop(uuid)

    def wire(self, blob: Blob) -> None:
        """Connect its table with what it reads where it has nothing of its own."""
        volume_table = self._store.volume_table(blob)
        parent = self._store.metadata.parent_of(blob)
        if blob.external_id is not None:
            uuid = external_uuid(blob.external_id)
            channel = self._externals.get(uuid) if uuid is not None else None
            volume_table.set_external(channel)
        else:
            volume_table.set_parent(
                self._store.volume_table(parent) if parent is not None else None
            )

    # External snapshots

    async def hold(self, bdev: Bdev) -> None:
        """Claim a bdev for reading. Raises: InUse, StoreError, HostError."""
        if bdev.uuid in self._externals:
            return
        if _stands_on(bdev, self._store.base):
            raise StoreError(
                errno.EINVAL,
                f"bdev '{bdev.name}' stands on the store itself",
                hint="make a snapshot and a clone with bdev_lvol_snapshot and bdev_lvol_clone",
            )
        self._registry.claim(bdev, self.by, READERS)
        try:
            channel = await self._registry.open_channel(bdev, self._store.space.base.reactor)
        except BaseException:  # cancelled, too
            self._registry.release(bdev, self.by)
            raise
        self._externals[bdev.uuid] = channel
        self.missing.discard(bdev.uuid)
        self._registry.subscribe(bdev, self._external_event)

    async def _drop(self, uuid: UUID) -> None:
        channel = self._externals.pop(uuid)
        self._registry.unsubscribe(channel.bdev, self._external_event)
        self._registry.release(channel.bdev, self.by)
        await self._registry.close_channel(channel)

    async def drop_unused(self) -> None:
        """Let go of external snapshots that no volume stands on any more."""
        used = {volume.external for volume in self._store.volumes}
        for uuid in set(self._externals) - used:
            await self._drop(uuid)
        self.missing &= {uuid for uuid in used if uuid is not None}

    async def _external_event(self, bdev: Bdev, event: str) -> None:
        if event == "remove" and bdev.uuid in self._externals:
            await self._store.lose_external(bdev.uuid)

    async def lose(self, uuid: UUID) -> None:
        """An external snapshot goes: the volumes on it go with it. The store's caller locks."""
        for volume in self._store.volumes:
            if volume.external == uuid:
                await self.hide(volume)
        if uuid in self._externals:
            self.missing.add(uuid)
            channel = self._externals[uuid]
            for volume in self._store.volumes:
                if volume.is_esnap_clone and volume.external == uuid:
                    self._store.volume_table(volume.blob).set_external(None)
            await self._drop(channel.bdev.uuid)

    async def find_again(self, bdev: Bdev) -> None:
        """A missing external snapshot is here: its volumes come. The store's caller locks."""
        try:
            await self.hold(bdev)
        except DrivebayError as error:
            _log.warning("the external snapshot '%s' can't be used: %s", bdev.name, error)
            return
        for volume in self._store.volumes:
            if volume.external == bdev.uuid:
                self.wire(volume.blob)
        for volume in self._store.volumes:
            if volume.external == bdev.uuid:
                self.show(volume)

    # Bdevs

    def _external_of(self, volume: Volume) -> Bdev | None:
        uuid = volume.external
        channel = self._externals.get(uuid) if uuid is not None else None
        return channel.bdev if channel is not None else None

    def show(self, volume: Volume) -> None:
        """Make a bdev of it, unless what it stands on is missing."""
        from drivebay.bdev.lvol.path import LvolBdev  # compiled; loaded with the first store

        if volume.bdev is not None:
            return
        external = self._external_of(volume)
        if volume.on_external and external is None:
            _log.warning("volume '%s' has no bdev: its external snapshot is missing", volume.alias)
            return
        try:
            bdev = LvolBdev(
                volume.unique_id,
                volume.uuid,
                self._store.space,
                volume.table,
                external,
                readonly=volume.blob.data_read_only,
                describe=volume.describe,
            )
            bdev.aliases = [volume.alias]
            self._registry.add(bdev)
        except DrivebayError as error:
            _log.error("volume '%s' has no bdev: %s", volume.alias, error)
            return
        volume.bdev = bdev
        self.shown[bdev.name] = volume

    async def hide(self, volume: Volume) -> None:
        """Remove its bdev; nothing of it is in flight then."""
        bdev, volume.bdev = volume.bdev, None
        if bdev is None:
            return
        self.shown.pop(bdev.name, None)
        try:
            if self._registry.get(bdev.name) is bdev:
                await self._registry.remove(bdev.name)
        except NotFound:
            pass  # somebody else removes it

    async def hide_all(self) -> None:
        """Remove all bdevs, clones before what they stand on."""
        for volume in reversed(self._store.volumes):
            await self.hide(volume)

    def name(self, volume: Volume) -> None:
        """Its bdev goes by the volume's name from now on."""
        if volume.bdev is not None:
            try:
                self._registry.set_aliases(volume.bdev, [volume.alias])
            except DrivebayError as error:
                _log.error("volume '%s' has no alias: %s", volume.alias, error)

    async def settle(self, volume: Volume) -> None:
        """Wait for those who only look into a new bdev; they open it, but are no users."""
        if volume.bdev is not None and self._registry.channels(volume.bdev):
            await self._registry.examining.wait_for(volume.bdev)

    async def require_same_bases(self, volume: Volume, external: UUID | None) -> None:
        """Raises: StoreError (EBUSY) when a bdev in use would have to stand on something else."""
        if volume.external == external:
            return
        for other in (volume, *self._store.descendants(volume.blob)):
            await self.settle(other)
            if other.bdev is not None and self._registry.channels(other.bdev):
                raise StoreError(
                    errno.EBUSY,
                    f"volume '{other.alias}' is in use, and would stand on another bdev",
                    hint="disconnect its users first",
                )

    async def renew(self, volume: Volume) -> None:
        """Bdevs that nobody uses stand on what they read from now; others keep the old one too."""
        for other in (volume, *self._store.descendants(volume.blob)):
            bdev = other.bdev
            if bdev is None:
                self.show(other)
                continue
            await self.settle(other)
            standing = bdev.bases[1] if len(bdev.bases) > 1 else None
            if standing is not self._external_of(other) and not self._registry.channels(bdev):
                await self.hide(other)
                self.show(other)
        await self.drop_unused()
