"""Snapshots and clones: who reads from whom, and what becomes of the clusters when one goes.

As volumes.py: changes of the metadata only, each checked first and then written in a safe order.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.blob import Blob
from drivebay.bdev.lvol.layout import ENTRIES_A_PAGE, StoreError
from drivebay.bdev.lvol.metadata import Dead, Metadata
from drivebay.bdev.lvol.volumes import persist_further, require_touchable
from drivebay.errors import DrivebayError

# Going


def check_deletable(metadata: Metadata, blob: Blob) -> list[Blob]:
    """Its only clone, or none. Raises: StoreError (EPERM, EBUSY)."""
    clones = metadata.clones_of(blob)
    if len(clones) > 1:
        names = ", ".join(f"'{clone.name}'" for clone in clones[:3])
        raise StoreError(
            errno.EPERM,
            f"snapshot '{blob.name}' has {len(clones)} clones: {names}"
            + (", …" if len(clones) > 3 else ""),
            hint="delete or decouple all but one of them first",
        )
    require_touchable(blob)
    for clone in clones:
        require_touchable(clone)
        if exposed(metadata, clone):
            raise StoreError(
                errno.EBUSY,
                f"clone '{clone.name}' is larger than snapshot '{blob.name}'; without it, it "
                "would read there what lies further down",
                hint=f"inflate or decouple '{clone.name}' first",
            )
    return clones


async def delete(metadata: Metadata, blob: Blob) -> Dead:
    """Take a volume off the disk; a snapshot's only clone takes its clusters over.

    The answer is to be cleared and released. Raises: StoreError (EPERM) for a snapshot with
    several clones; DrivebayError.
    """
    clones = check_deletable(metadata, blob)
    await metadata.begin_change()
    if clones:
        await _hand_over(metadata, blob, clones[0])
    await metadata.zero_page(blob.root)
    metadata.unlink(blob)
    del metadata.blobs[blob.id]
    metadata.names.remove(blob.name)
    metadata.clones.pop(blob.id, None)
    metadata.give_pages([*blob.pages[1:], *(blob.table.extent_pages or ())])
    metadata.used_pages[blob.root] = 0
    return Dead(blob.table, 0, blob.clear_method)


async def _hand_over(metadata: Metadata, snapshot: Blob, clone: Blob) -> None:
    """After this the clone reads nothing from the snapshot, on disk and in memory."""
    merge = _Merge(metadata, snapshot, clone)
    merge.prepare()
    snapshot.set_reference(layout.REMOVAL_BEGUN, clone.id)
    try:
        await metadata.persist(snapshot)
    except StoreError:
        del snapshot.internal[layout.REMOVAL_BEGUN]
        metadata.give_pages(merge.pages.values())
        raise
    merge.run()
    for index, number in merge.pages.items():
        await metadata.write_extent_page(clone, index, number)
    metadata.unlink(clone)
    clone.internal.pop(layout.SNAPSHOT_OF, None)
    for key in (layout.SNAPSHOT_OF, layout.EXTERNAL_ID):
        if key in snapshot.internal:
            clone.internal[key] = snapshot.internal[key]
    clone.invalid_flags |= snapshot.invalid_flags & layout.EXTERNAL_SNAPSHOT
    await persist_further(metadata, clone)
    metadata.link(clone)
    metadata.give_pages(merge.replaced)


@dataclass
class _Merge:
    """A clone gets what it read from a snapshot; what it has of its own stays the snapshot's.

    New extent pages are written, never those of the clone in place, so that the clone's root
    alone decides. A page of the snapshot changes hands where the clone has none.
    """

    metadata: Metadata
    snapshot: Blob
    clone: Blob
    pages: dict[int, int] = field(default_factory=dict)  # new ones by index
    replaced: list[int] = field(default_factory=list)  # of the clone

    def prepare(self) -> None:
        """Claim the pages. Raises: StoreError (ENOMEM)."""
        ours = self.clone.table.extent_pages
        if ours is None:
            return
        lacking = [
            index for index in self._parts() if ours[index] or not self._may_take_page(index)
        ]
        self.pages = dict(zip(lacking, self.metadata.take_pages(len(lacking)), strict=True))

    def _common(self) -> int:
        return min(self.snapshot.table.num_clusters, self.clone.table.num_clusters)

    def _parts(self) -> Iterable[int]:
        """Each stretch of 512 clusters in which the snapshot may have some for the clone."""
        theirs = self.snapshot.table.extent_pages
        for index in range(-(-self._common() // ENTRIES_A_PAGE)):
            if theirs is None or theirs[index]:
                yield index

    def _may_take_page(self, index: int) -> bool:
        """A page can change hands if it is one, and has as many entries for both."""
        end = (index + 1) * ENTRIES_A_PAGE
        lengths = [min(end, b.table.num_clusters) for b in (self.snapshot, self.clone)]
        return self.snapshot.has_extent_table and lengths[0] == lengths[1]

    def run(self) -> None:
        """Change both tables."""
        theirs, ours = self.snapshot.table, self.clone.table
        common = self._common()
        for index in self._parts():
            start = index * ENTRIES_A_PAGE
            end = min(start + ENTRIES_A_PAGE, common)
            _move(theirs.clusters[start:end], ours.clusters[start:end])
            pages = ours.extent_pages
            if pages is None:
                continue
            if index in self.pages:
                self.replaced.append(pages[index])
                pages[index] = self.pages[index]
            elif theirs.extent_pages is not None:
                pages[index], theirs.extent_pages[index] = theirs.extent_pages[index], 0
        theirs.recount()
        ours.recount()


def _move(source: memoryview[int], target: memoryview[int]) -> None:
    """What the target lacks, and the source has no more."""
    for index, cluster in enumerate(source):
        if cluster and not target[index]:
            target[index] = cluster
            source[index] = 0


# Changing parents


async def _change(metadata: Metadata, blob: Blob, change: Callable[[], None]) -> None:
    """Change a blob's flags and references, or nothing. Raises: DrivebayError."""
    require_touchable(blob)
    await metadata.begin_change()
    flags, internal = blob.invalid_flags, dict(blob.internal)
    metadata.unlink(blob)
    change()
    try:
        await metadata.persist(blob)
    except StoreError:
        blob.invalid_flags, blob.internal = flags, internal
        raise
    finally:
        metadata.link(blob)


def _require_thin(blob: Blob) -> None:
    if not blob.thin:
        raise StoreError(
            errno.EINVAL,
            f"volume '{blob.name}' is not thin: it has all clusters of its own and needs no parent",
        )


async def set_parent(metadata: Metadata, blob: Blob, parent: Blob) -> None:
    """What the volume has not of its own is read from another snapshot. Raises: DrivebayError."""
    ancestor: Blob | None = parent
    while ancestor is not None:
        if ancestor is blob:
            raise StoreError(
                errno.EINVAL, f"volume '{blob.name}' can't be its own parent, directly or not"
            )
        ancestor = metadata.parent_of(ancestor)
    if blob.parent_id == parent.id:
        raise StoreError(
            errno.EEXIST, f"'{parent.name}' is the parent of volume '{blob.name}' already"
        )
    _require_thin(blob)
    if not (metadata.is_snapshot(parent) or parent.data_read_only):
        raise StoreError(errno.EINVAL, f"volume '{parent.name}' is no snapshot")
    sizes = [b.table.num_clusters for b in (blob, parent)]
    if sizes[0] != sizes[1]:
        raise StoreError(
            errno.EINVAL,
            f"volume '{blob.name}' has {sizes[0]} clusters, '{parent.name}' has {sizes[1]}; "
            "a parent must have as many",
        )

    def change() -> None:
        _drop_references(blob)
        blob.set_reference(layout.SNAPSHOT_OF, parent.id)

    await _change(metadata, blob, change)


def _drop_references(blob: Blob) -> None:
    blob.internal.pop(layout.SNAPSHOT_OF, None)
    blob.internal.pop(layout.EXTERNAL_ID, None)
    blob.invalid_flags &= ~layout.EXTERNAL_SNAPSHOT


def check_external_parent(metadata: Metadata, blob: Blob, external: bytes, size: int) -> None:
    """Raises: StoreError (EINVAL, EEXIST, EPERM)."""
    if external == blob.xattrs.get(b"uuid"):
        raise StoreError(errno.EINVAL, f"volume '{blob.name}' can't be its own parent")
    if size % metadata.sb.cluster_bytes:
        raise StoreError(
            errno.EINVAL,
            f"the new parent of volume '{blob.name}' has {size} bytes, no multiple of the "
            f"store's clusters of {metadata.sb.cluster_bytes}",
        )
    if blob.external_id == external:
        raise StoreError(errno.EEXIST, f"that bdev is the parent of volume '{blob.name}' already")
    _require_thin(blob)
    require_touchable(blob)


async def set_external_parent(metadata: Metadata, blob: Blob, external: bytes, size: int) -> None:
    """The same from another bdev, of ``size`` bytes. Raises: DrivebayError."""
    check_external_parent(metadata, blob, external, size)

    def change() -> None:
        _drop_references(blob)
        blob.internal[layout.EXTERNAL_ID] = external
        blob.invalid_flags |= layout.EXTERNAL_SNAPSHOT | layout.HAS_INTERNAL_XATTRS

    await _change(metadata, blob, change)


def lacking(metadata: Metadata, blob: Blob, *, everything: bool) -> list[int]:
    """Which clusters must be allocated before inflated() or decoupled() may be called.

    Raises: StoreError: EINVAL when there is no parent to decouple from, ENOSPC.
    """
    parent = metadata.parent_of(blob)
    if not everything and parent is None and blob.external_id is None:
        raise StoreError(errno.EINVAL, f"volume '{blob.name}' has no parent to decouple it from")
    if not blob.thin:
        return []
    clusters = blob.table.clusters
    if everything or parent is None:
        found = [index for index, cluster in enumerate(clusters) if not cluster]
    else:
        pairs = enumerate(zip(parent.table.clusters, clusters, strict=False))
        found = [index for index, (theirs, ours) in pairs if theirs and not ours]
        found += exposed(metadata, blob)
    if len(found) > metadata.free.free:
        raise StoreError(
            errno.ENOSPC,
            f"volume '{blob.name}' needs {len(found)} clusters more; store '{metadata.name}' has "
            f"{metadata.free.free} free ones",
        )
    return found


def exposed(metadata: Metadata, blob: Blob) -> list[int]:
    """Where a volume is larger than its parent, and a grandparent would show through without it."""
    parent = metadata.parent_of(blob)
    if parent is None:
        return []
    begin, end = parent.table.num_clusters, blob.table.num_clusters
    above = metadata.parent_of(parent)
    if above is not None:
        end = min(end, above.table.num_clusters)
    elif parent.external_id is None:
        return []
    clusters = blob.table.clusters
    return [index for index in range(begin, end) if not clusters[index]]


async def inflated(metadata: Metadata, blob: Blob) -> None:
    """All clusters are there: the volume is thin no more and has no parent.

    Raises: StoreError (EAGAIN) when one is missing again; DrivebayError.
    """
    if not blob.thin:
        return
    if blob.table.allocated != blob.table.num_clusters:
        raise StoreError(errno.EAGAIN, f"clusters of volume '{blob.name}' are still missing")

    def change() -> None:
        _drop_references(blob)
        blob.invalid_flags &= ~layout.THIN

    await _change(metadata, blob, change)


async def decoupled(metadata: Metadata, blob: Blob) -> None:
    """What the parent had is there: its parent becomes the volume's. Raises: DrivebayError."""
    parent = metadata.parent_of(blob)
    if parent is None:
        await inflated(metadata, blob)
        return
    if lacking(metadata, blob, everything=False):
        raise StoreError(errno.EAGAIN, f"clusters of volume '{blob.name}' are still missing")

    def change() -> None:
        _drop_references(blob)
        for key in (layout.SNAPSHOT_OF, layout.EXTERNAL_ID):
            if key in parent.internal:
                blob.internal[key] = parent.internal[key]
        blob.invalid_flags |= parent.invalid_flags & layout.EXTERNAL_SNAPSHOT

    await _change(metadata, blob, change)


# What the owner of the free space asks for


async def add_extent_pages(metadata: Metadata, blob: Blob, indexes: Iterable[int]) -> None:
    """Give it the extent pages of these indexes, with no entries yet.

    Raises: DrivebayError, and it has none of them; what a failed write left is put right later.
    """
    pages = blob.table.extent_pages
    assert pages is not None
    missing = [index for index in sorted(set(indexes)) if not pages[index]]
    await metadata.begin_change()
    numbers = metadata.take_pages(len(missing))
    for index, number in zip(missing, numbers, strict=True):
        pages[index] = number
    try:
        with metadata.repeatable(blob):
            for index, number in zip(missing, numbers, strict=True):
                await metadata.write_extent_page(blob, index, number)
            await metadata.persist(blob)
    except DrivebayError:
        for index in missing:
            pages[index] = 0
        metadata.drop_pages(blob, numbers)
        raise


async def save_clusters(metadata: Metadata, blob: Blob, new: dict[int, int]) -> None:
    """Save new clusters of a volume of run lengths; its table gets them from the caller.

    Raises: DrivebayError.
    """
    await metadata.begin_change()
    clusters = array("I", blob.table.clusters)
    for index, cluster in new.items():
        clusters[index] = cluster
    with metadata.repeatable(blob):
        await metadata.persist(blob, clusters=clusters)
