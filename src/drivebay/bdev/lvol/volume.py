"""One volume as control shows it: a blob, and its bdev while it can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from drivebay.bdev.lvol.blob import Blob

if TYPE_CHECKING:
    from drivebay.bdev.lvol.path import LvolBdev
    from drivebay.bdev.lvol.store import Store
    from drivebay.bdev.lvol.table import ClusterTable

__all__ = ["Volume", "external_uuid"]


def external_uuid(external_id: bytes) -> UUID | None:
    """The uuid of the bdev that an external snapshot's id names; None when it is no uuid."""
    try:
        return UUID(external_id.rstrip(b"\0").decode())
    except ValueError:
        return None


class Volume:
    """A logical volume of an open store. Context: control."""

    __slots__ = ("bdev", "blob", "busy", "store")

    def __init__(self, store: Store, blob: Blob) -> None:
        self.store = store
        self.blob = blob
        self.bdev: LvolBdev | None = None  # None: the external snapshot below is missing
        self.busy: str | None = None  # what is done to it, for long

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self.blob.name

    @property
    def uuid(self) -> UUID | None:
        """Its uuid; very old volumes have none."""
        return self.blob.uuid

    @property
    def unique_id(self) -> str:
        """The name of its bdev."""
        uuid = self.blob.uuid
        return str(uuid) if uuid is not None else f"{self.store.uuid}_{self.blob.id}"

    @property
    def alias(self) -> str:
        """What people call it."""
        return f"{self.store.name}/{self.name}"

    @property
    def table(self) -> ClusterTable:
        """Where its clusters lie."""
        return self.store.volume_table(self.blob)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.blob.table.num_clusters * self.store.cluster_bytes

    @property
    def allocated(self) -> int:
        """How many clusters are its own."""
        return self.blob.table.allocated

    @property
    def is_thin(self) -> bool:
        """Whether clusters may be missing."""
        return self.blob.thin

    @property
    def is_snapshot(self) -> bool:
        """Whether clones stand on it, or did."""
        return self.store.metadata.is_snapshot(self.blob)

    @property
    def is_clone(self) -> bool:
        """Whether it stands on a snapshot of the store."""
        return self.blob.parent_id is not None

    @property
    def is_esnap_clone(self) -> bool:
        """Whether it stands on another bdev."""
        return self.blob.external_id is not None

    @property
    def is_degraded(self) -> bool:
        """Whether what it stands on is missing."""
        return self.bdev is None

    @property
    def external(self) -> UUID | None:
        """The uuid of the bdev at the end of its chain of parents."""
        blob: Blob | None = self.blob
        while blob is not None:
            if blob.external_id is not None:
                return external_uuid(blob.external_id)
            blob = self.store.metadata.parent_of(blob)
        return None

    @property
    def on_external(self) -> bool:
        """Whether its chain of parents ends in another bdev."""
        blob: Blob | None = self.blob
        while blob is not None:
            if blob.external_id is not None:
                return True
            blob = self.store.metadata.parent_of(blob)
        return False

    def describe(self) -> dict[str, Any]:
        """The "lvol" object of bdev_get_bdevs."""
        metadata = self.store.metadata
        found: dict[str, Any] = {
            "lvol_store_uuid": str(self.store.uuid),
            "base_bdev": self.store.base.name,
            "thin_provision": self.is_thin,
            "num_allocated_clusters": self.allocated,
            "snapshot": self.is_snapshot,
            "clone": self.is_clone,
        }
        parent = metadata.parent_of(self.blob)
        if parent is not None:
            found["base_snapshot"] = parent.name
        clones = metadata.clones_of(self.blob)
        if clones:
            found["clones"] = [clone.name for clone in clones]
        found["esnap_clone"] = self.is_esnap_clone
        if self.is_esnap_clone:
            external_id = self.blob.external_id or b""
            found["external_snapshot_name"] = external_id.rstrip(b"\0").decode(errors="replace")
        if self.store.free_clusters == 0:
            found["lvol_store_full"] = True
        return found
