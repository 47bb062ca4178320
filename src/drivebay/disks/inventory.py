"""Pools, disks and snapshots of a running target, as its RPC tells of them.

Context: a short-lived process; one look at the target makes one Inventory, which does not
change. A pool is a logical volume store, a disk whatever a machine could be given: a volume
in a pool, a file or device, a part of one. A snapshot that the command line makes is a volume
called DISK@SNAPSHOT, so that two disks may each have a snapshot 'before-upgrade'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.disks.connection import RpcRefused, call
from drivebay.errors import NotFound, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["NAME_BYTES_MOST", "Disk", "Inventory", "Pool", "Use", "check_name", "read_inventory"]

# SPDK's names of stores and volumes are 64 bytes with their final NUL.
NAME_BYTES_MOST: Final = 63

_METHOD_NOT_FOUND: Final = -32601

LIMITS: Final = {
    "rw_ios_per_sec": "IOPS",
    "rw_mbytes_per_sec": "MiB/s",
    "r_mbytes_per_sec": "MiB/s read",
    "w_mbytes_per_sec": "MiB/s write",
}


@dataclass(frozen=True, slots=True)
class Use:
    """A controller that shows a disk to machines, and how many are connected to it."""

    controller: str
    sessions: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A logical volume store and what it stands on."""

    name: str
    uuid: str
    base: str  # the bdev below
    place: str | None  # its file or device, None if it is neither
    module: str  # of the bdev below: aio, uring …
    cluster_bytes: int
    total_clusters: int
    free_clusters: int
    growable_bytes: int

    @property
    def size(self) -> int:
        """Bytes for data."""
        return self.total_clusters * self.cluster_bytes

    @property
    def used(self) -> int:
        """Bytes that disks and snapshots have filled or reserved."""
        return (self.total_clusters - self.free_clusters) * self.cluster_bytes


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk or, if ``snapshot``, a frozen state of one."""

    name: str  # within its pool, or the bdev's
    bdev: str
    aliases: tuple[str, ...]
    kind: str  # 'thin', 'thick', 'file', 'split', or what SPDK calls the product
    pool: str | None
    size: int
    block_size: int
    snapshot: bool = False
    used: int | None = None
    parent: str | None = None  # the snapshot below, by its name in the pool
    external: str | None = None  # the bdev below that it begins with, by name or uuid
    place: str | None = None
    base: str | None = None  # of a split
    module: str = ""
    claimed: bool = False
    limits: tuple[tuple[str, int], ...] = ()
    uses: tuple[Use, ...] = ()

    @property
    def reference(self) -> str:
        """A name that means it to every method."""
        return self.bdev if self.pool is None else f"{self.pool}/{self.name}"

    @property
    def sessions(self) -> int:
        """How many machines are connected to it."""
        return sum(use.sessions for use in self.uses)


@dataclass(frozen=True)
class Inventory:
    """Everything that was there at one moment."""

    pools: tuple[Pool, ...]
    volumes: tuple[Disk, ...]  # all bdevs, snapshots and bases among them

    @property
    def disks(self) -> list[Disk]:
        """What a machine could be given: no snapshot, and nothing that something stands on."""
        return [
            disk
            for disk in self.volumes
            if not disk.snapshot and (disk.pool is not None or not disk.claimed)
        ]

    def pool(self, name: str) -> Pool:
        """The pool of that name. Raises: NotFound."""
        for pool in self.pools:
            if name in (pool.name, pool.uuid):
                return pool
        raise NotFound(f"there is no pool '{name[:80]}'", hint="drivebay pool list")

    def disks_of(self, pool: Pool) -> list[Disk]:
        """The disks in a pool, without their snapshots."""
        return [disk for disk in self.disks if disk.pool == pool.name]

    def disk(self, name: str) -> Disk:
        """The disk or snapshot that NAME, POOL/NAME, NAME@SNAPSHOT or a uuid means.

        Raises: NotFound; UsageError when it means several.
        """
        found = [
            disk
            for disk in self.volumes
            if name in (disk.name, disk.bdev, disk.reference, *disk.aliases)
        ]
        if len(found) > 1:
            names = ", ".join(disk.reference for disk in found)
            raise UsageError(
                f"'{name[:80]}' is the name of {len(found)} disks: {names}",
                hint="name its pool too",
            )
        if found:
            return found[0]
        raise NotFound(f"there is no disk '{name[:80]}'", hint="drivebay disk list")

    def has(self, pool: str | None, name: str) -> bool:
        """Whether that pool has a volume of that name."""
        return (pool, name) in self._by_name

    def is_taken(self, name: str) -> bool:
        """Whether a disk, pool's base or snapshot has that name."""
        return any(name in (disk.name, disk.bdev, *disk.aliases) for disk in self.volumes)

    # A pool may hold ten thousand volumes: these make each question about one of them short.

    @cached_property
    def _by_name(self) -> dict[tuple[str | None, str], Disk]:
        return {(volume.pool, volume.name): volume for volume in self.volumes}

    @cached_property
    def _by_parent(self) -> dict[tuple[str | None, str], list[Disk]]:
        found: dict[tuple[str | None, str], list[Disk]] = {}
        for volume in self.volumes:
            if volume.parent is not None:
                found.setdefault((volume.pool, volume.parent), []).append(volume)
        return found

    @cached_property
    def _by_owner(self) -> dict[tuple[str | None, str], list[Disk]]:
        """Snapshots by the disk that is in their name, whether it is there or not."""
        found: dict[tuple[str | None, str], list[Disk]] = {}
        for volume in self.volumes:
            owner, mark, _ = volume.name.partition("@")
            if volume.snapshot and mark:
                found.setdefault((volume.pool, owner), []).append(volume)
        return found

    def chain(self, disk: Disk) -> Iterator[Disk]:
        """The snapshots below a disk, its own state's ancestors, newest first."""
        seen = set()
        while disk.parent is not None and disk.parent not in seen:
            seen.add(disk.parent)
            below = self._by_name.get((disk.pool, disk.parent))
            if below is None:
                return
            disk = below
            yield disk

    def snapshots_of(self, disk: Disk) -> list[Disk]:
        """The snapshots that belong to a disk, oldest first: by their name, or as nobody else's."""
        if disk.pool is None or disk.snapshot:
            return []
        own = [snapshot for snapshot in self.chain(disk) if self._owner(snapshot) in (None, disk)]
        own.reverse()
        named = self._by_owner.get((disk.pool, disk.name), [])
        return own + [snapshot for snapshot in named if snapshot not in own]

    def _owner(self, snapshot: Disk) -> Disk | None:
        """The disk in a snapshot's name."""
        name = snapshot.name.partition("@")[0]
        owner = self._by_name.get((snapshot.pool, name))
        return None if owner is None or owner.snapshot else owner

    def snapshot_of(self, disk: Disk, name: str) -> Disk:
        """A disk's snapshot, by SNAPSHOT or DISK@SNAPSHOT. Raises: NotFound."""
        owned = self.snapshots_of(disk)
        for snapshot in owned:
            if snapshot.name in (f"{disk.name}@{name}", name):
                return snapshot
        names = ", ".join(short_name(disk, snapshot) for snapshot in owned)
        raise NotFound(
            f"disk '{disk.name}' has no snapshot '{name[:80]}'",
            hint=f"it has: {names}" if names else f"drivebay disk snapshot {disk.name}",
        )

    def children(self, snapshot: Disk) -> list[Disk]:
        """The volumes that read from a snapshot directly."""
        return self._by_parent.get((snapshot.pool, snapshot.name), [])

    def clones_of(self, disk: Disk) -> list[Disk]:
        """Other disks that read from one of this disk's snapshots."""
        found: dict[str, Disk] = {}
        waiting = self.snapshots_of(disk)
        seen = {volume.name for volume in waiting}
        while waiting:
            for child in self.children(waiting.pop(0)):
                if child.snapshot and child.name not in seen:
                    seen.add(child.name)
                    waiting.append(child)
                elif not child.snapshot and child.name != disk.name:
                    found[child.name] = child
        return list(found.values())

    def parts_of(self, disk: Disk) -> list[Disk]:
        """The parts that a disk was split into."""
        return [other for other in self.volumes if other.base == disk.bdev]

    def pool_on(self, disk: Disk) -> Pool | None:
        """The pool that stands on a bdev."""
        return next((pool for pool in self.pools if pool.base == disk.bdev), None)


def short_name(disk: Disk, snapshot: Disk) -> str:
    """A snapshot's name without its disk's."""
    return snapshot.name.removeprefix(f"{disk.name}@")


def check_name(name: str, what: str) -> None:
    """Refuse a name that could not be written in a command or is too long. Raises: UsageError."""
    if not name or len(name.encode()) > NAME_BYTES_MOST:
        raise UsageError(f"a {what}'s name has 1 to {NAME_BYTES_MOST} bytes; '{name[:80]}' has "
                         f"{len(name.encode())}")  # fmt: skip
    bad = [
        letter for letter in name if letter in "/@" or letter.isspace() or not letter.isprintable()
    ]
    if bad or name.startswith("-"):
        raise UsageError(
            f"'{name[:80]}' can't be the name of a {what}: no spaces, '/', '@' or '-' at its start"
        )


def read_inventory(client: Client) -> Inventory:
    """Ask the target what there is. Raises: RpcRefused, Unreachable."""
    stores = _stores(client)
    bdevs = call(client, "bdev_get_bdevs")
    uses = _uses(call(client, "vhost_get_controllers"))
    by_uuid = {store["uuid"]: store for store in stores}
    volumes = [_volume(bdev, by_uuid) for bdev in bdevs]
    volumes = [
        replace(
            volume,
            uses=tuple(
                use for name in {volume.bdev, *volume.aliases} for use in uses.get(name, ())
            ),
        )
        for volume in volumes
    ]
    places = {volume.bdev: volume for volume in volumes}
    return Inventory(tuple(_pool(store, places) for store in stores), tuple(volumes))


def _stores(client: Client) -> list[dict[str, Any]]:
    """A target that may not be asked for pools (--rpcs-allowed) still has disks."""
    try:
        found: list[dict[str, Any]] = call(client, "bdev_lvol_get_lvstores")
    except RpcRefused as error:
        if error.code == _METHOD_NOT_FOUND:
            return []
        raise
    return found


def _pool(store: dict[str, Any], volumes: dict[str, Disk]) -> Pool:
    base = volumes.get(store["base_bdev"])
    return Pool(
        name=store["name"],
        uuid=store["uuid"],
        base=store["base_bdev"],
        place=None if base is None else base.place,
        module="" if base is None else base.module,
        cluster_bytes=store["cluster_size"],
        total_clusters=store["total_data_clusters"],
        free_clusters=store["free_clusters"],
        growable_bytes=store.get("max_growable_size", 0),
    )


def _volume(bdev: dict[str, Any], stores: dict[str, dict[str, Any]]) -> Disk:
    specific = bdev["driver_specific"]
    size = bdev["block_size"] * bdev["num_blocks"]
    limits = bdev.get("assigned_rate_limits", {})
    common = Disk(
        name=bdev["name"],
        bdev=bdev["name"],
        aliases=tuple(bdev["aliases"]),
        kind=bdev["product_name"],
        pool=None,
        size=size,
        block_size=bdev["block_size"],
        claimed=bdev["claimed"],
        limits=tuple((name, limits[name]) for name in LIMITS if limits.get(name)),
    )
    lvol = specific.get("lvol")
    store = None if lvol is None else stores.get(lvol["lvol_store_uuid"])
    if lvol is not None and store is not None:
        writable = bool(bdev.get("supported_io_types", {}).get("write", True))
        return _lvol(common, lvol, store, writable)
    for module in ("aio", "uring"):
        if module in specific:
            place = str(specific[module]["filename"])
            return replace(common, kind="file", module=module, place=place, used=_blocks(place))
    if "split" in specific:
        base = str(specific["split"]["base_bdev"])
        return replace(common, kind="split", module="split", base=base)
    return common


def _lvol(common: Disk, lvol: dict[str, Any], store: dict[str, Any], writable: bool) -> Disk:
    prefix = f"{store['name']}/"
    names = [alias for alias in (*common.aliases, common.bdev) if alias.startswith(prefix)]
    name = names[0].removeprefix(prefix) if names else common.bdev
    # A target that has just started takes a snapshot from which nobody reads for a volume that
    # may not be written.
    lone = "@" in name and not writable
    return replace(
        common,
        name=name,
        kind="thin" if lvol["thin_provision"] else "thick",
        module="lvol",
        pool=store["name"],
        snapshot=lvol["snapshot"] or lone,
        used=lvol["num_allocated_clusters"] * store["cluster_size"],
        parent=lvol.get("base_snapshot"),
        external=lvol.get("external_snapshot_name"),
    )


def _blocks(place: str) -> int | None:
    """Bytes that a file takes up on its file system, if it can be seen from here."""
    try:
        status = Path(place).stat()
    except OSError:
        return None
    return status.st_blocks * 512 if Path(place).is_file() else None


def _uses(controllers: list[dict[str, Any]]) -> dict[str, list[Use]]:
    """The controllers by the bdev that they show."""
    found: dict[str, list[Use]] = {}
    for entry in controllers:
        use = Use(entry["ctrlr"], len(entry.get("sessions", ())))
        specific = entry.get("backend_specific", {})
        bdevs = [specific.get("block", {}).get("bdev")]
        bdevs += [lun["bdev_name"] for scsi in specific.get("scsi", ()) for lun in scsi["luns"]]
        for bdev in bdevs:
            if bdev is not None:
                found.setdefault(bdev, []).append(use)
    return found
