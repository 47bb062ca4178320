"""What can be done with volumes, as changes of the metadata; the content is not touched.

Each function checks first and raises StoreError with SPDK's code, nothing having changed; then it
writes in the order that metadata.py explains. The end states are SPDK's, so it opens what we
wrote. Context: control; the store's space is frozen, and the volumes whose clusters change hands
are quiesced.
"""

from __future__ import annotations

import errno
from array import array
from uuid import UUID

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.blob import MAX_CLUSTERS, Blob, extent_page_count
from drivebay.bdev.lvol.layout import ENTRIES_A_PAGE, StoreError, divide_up
from drivebay.bdev.lvol.metadata import CLEAR_DEFAULT, Dead, Metadata


def check_name(name: str, what: str) -> bytes:
    """The name as it is saved, without its zero. Raises: StoreError (EINVAL)."""
    raw = name.encode()
    if not 0 < len(raw) < layout.NAME_MAX or b"\0" in raw:
        raise StoreError(
            errno.EINVAL,
            f"the name of {what} must have 1 to {layout.NAME_MAX - 1} bytes; "
            f"'{name[:80]}' has {len(raw)}",
        )
    return raw


def _check_new_name(metadata: Metadata, name: str) -> bytes:
    raw = check_name(name, "a volume")
    if name in metadata.names:
        raise StoreError(
            errno.EEXIST, f"store '{metadata.name}' has a volume called '{name}' already"
        )
    return raw


def require_touchable(blob: Blob) -> None:
    """Raises: StoreError (EPERM) when a newer program forbids changes."""
    if blob.untouchable:
        raise StoreError(
            errno.EPERM,
            f"volume '{blob.name}' was written by a newer program, which says that others may "
            "not change it",
        )


def _require_writable(blob: Blob, what: str, code: int = errno.EPERM) -> None:
    if blob.metadata_read_only:
        raise StoreError(code, f"volume '{blob.name}' is read-only and can't be {what}")


def clusters_for(metadata: Metadata, size: int) -> int:
    """How many clusters hold ``size`` bytes. Raises: StoreError (ENOMEM) for too many."""
    count = divide_up(size, metadata.sb.cluster_bytes)
    if count > MAX_CLUSTERS:
        raise StoreError(
            errno.ENOMEM,
            f"a volume of {size} bytes would have {count} clusters; {MAX_CLUSTERS} are possible",
            hint="make a store with larger clusters",
        )
    return count


def _check_free(metadata: Metadata, clusters: int, why: str) -> None:
    if clusters > metadata.free.free:
        raise StoreError(
            errno.ENOSPC,
            f"{why} takes {clusters} clusters; store '{metadata.name}' has "
            f"{metadata.free.free} free ones of {metadata.sb.cluster_bytes} bytes",
        )


# Making volumes


async def create(
    metadata: Metadata,
    name: str,
    uuid: UUID,
    size: int,
    *,
    thin: bool = False,
    clear_method: int = CLEAR_DEFAULT,
    external: bytes | None = None,
) -> Blob:
    """Make a volume; with ``external`` a clone of another bdev. Raises: DrivebayError."""
    raw_name = _check_new_name(metadata, name)
    thin = thin or external is not None
    if not thin:
        _check_free(metadata, divide_up(size, metadata.sb.cluster_bytes), f"volume '{name}'")
    count = clusters_for(metadata, size)
    await metadata.begin_change()
    blob = _new_blob(metadata, raw_name, uuid, count, extent_table=True)
    blob.md_ro_flags = clear_method
    if thin:
        blob.invalid_flags |= layout.THIN
    if external is not None:
        blob.invalid_flags |= layout.EXTERNAL_SNAPSHOT | layout.HAS_INTERNAL_XATTRS
        blob.internal[layout.EXTERNAL_ID] = external
    await _write_new(metadata, blob)
    return blob


def _new_blob(
    metadata: Metadata, raw_name: bytes, uuid: UUID, num_clusters: int, *, extent_table: bool
) -> Blob:
    [root] = metadata.take_pages(1)
    blob_id = layout.ID_BIT | root
    blob = Blob(blob_id, metadata.make_table(num_clusters, blob_id, extent_table), pages=[root])
    if extent_table:
        blob.invalid_flags = layout.HAS_EXTENT_TABLE
    blob.xattrs[b"name"] = raw_name.ljust(layout.NAME_MAX, b"\0")
    blob.xattrs[b"uuid"] = str(uuid).encode() + b"\0"
    return blob


async def _write_new(metadata: Metadata, blob: Blob) -> None:
    """Put a blob on disk; all of its clusters first when it is not thin."""
    try:
        if not blob.thin:
            _allocate(metadata, blob, 0)
            for index, number in enumerate(blob.table.extent_pages or ()):
                await metadata.write_extent_page(blob, index, number)
        await metadata.persist(blob)
    except StoreError:
        metadata.release(Dead(blob.table, 0, CLEAR_DEFAULT))
        metadata.give_pages([blob.root, *(blob.table.extent_pages or ())])
        raise
    metadata.blobs[blob.id] = blob
    metadata.names.add(blob.name)
    metadata.link(blob)


def _allocate(metadata: Metadata, blob: Blob, first: int) -> None:
    """Give it the clusters from ``first`` on, and the extent pages that it lacks for them."""
    pages = blob.table.extent_pages
    if pages is not None:
        lacking = [index for index, number in enumerate(pages) if not number]
        numbers = metadata.take_pages(len(lacking), errno.ENOSPC)
        for index, number in zip(lacking, numbers, strict=True):
            pages[index] = number
    metadata.free.allocate(blob.table, first, blob.table.num_clusters - first)


async def clone(metadata: Metadata, snapshot: Blob, name: str, uuid: UUID) -> Blob:
    """Make a volume that begins as a snapshot. Raises: DrivebayError."""
    raw_name = _check_new_name(metadata, name)
    if not snapshot.data_read_only:
        raise StoreError(
            errno.EINVAL,
            f"volume '{snapshot.name}' is not read-only, so it can't have clones",
            hint="make a snapshot of it first, and a clone of that",
        )
    await metadata.begin_change()
    blob = _new_blob(
        metadata,
        raw_name,
        uuid,
        snapshot.table.num_clusters,
        extent_table=snapshot.has_extent_table,
    )
    blob.invalid_flags |= layout.THIN
    blob.set_reference(layout.SNAPSHOT_OF, snapshot.id)
    await _write_new(metadata, blob)
    return blob


async def snapshot(metadata: Metadata, blob: Blob, name: str, uuid: UUID) -> Blob:
    """Hand the clusters of a volume to a new read-only one, its parent. Raises: DrivebayError."""
    raw_name = _check_new_name(metadata, name)
    _require_writable(blob, "snapshotted", errno.EINVAL)
    await metadata.begin_change()
    table = blob.table
    new = _new_blob(
        metadata, raw_name, uuid, table.num_clusters, extent_table=blob.has_extent_table
    )
    new.invalid_flags = blob.invalid_flags
    new.md_ro_flags = blob.clear_method
    for key in (layout.SNAPSHOT_OF, layout.EXTERNAL_ID):
        if key in blob.internal:
            new.internal[key] = blob.internal[key]
    new.set_reference(layout.SNAPSHOT_BEGUN, blob.id)
    new.table.clusters[:] = table.clusters
    if new.table.extent_pages is not None and table.extent_pages is not None:
        new.table.extent_pages[:] = table.extent_pages
    new.table.recount()
    try:
        await metadata.persist(new)
    except StoreError:
        metadata.give_pages([new.root])
        raise
    metadata.unlink(blob)
    metadata.blobs[new.id] = new
    metadata.names.add(name)
    metadata.link(new)
    forget_clusters(blob)
    blob.internal.pop(layout.EXTERNAL_ID, None)
    blob.invalid_flags = blob.invalid_flags & ~layout.EXTERNAL_SNAPSHOT | layout.THIN
    blob.set_reference(layout.SNAPSHOT_OF, new.id)
    await persist_further(metadata, blob)
    metadata.link(blob)
    del new.internal[layout.SNAPSHOT_BEGUN]
    new.data_ro_flags |= layout.READ_ONLY
    await persist_further(metadata, new)
    return new


def forget_clusters(blob: Blob) -> None:
    """All entries of its table are missing again; the clusters belong to somebody else."""
    memory = blob.table.clusters.cast("B")
    memory[:] = bytes(len(memory))
    if blob.table.extent_pages is not None:
        memory = blob.table.extent_pages.cast("B")
        memory[:] = bytes(len(memory))
    blob.table.recount()


async def persist_further(metadata: Metadata, blob: Blob) -> None:
    """The second and later steps of one change: no page left is a failure of the whole then."""
    try:
        await metadata.persist(blob)
    except StoreError as error:
        metadata.failure = metadata.failure or error
        raise


# Changing volumes


async def rename(metadata: Metadata, blob: Blob, name: str) -> None:
    """Give it another name. Raises: DrivebayError."""
    old = blob.name
    if name == old:
        return
    raw_name = _check_new_name(metadata, name)
    _require_writable(blob, "renamed")
    await _change_xattr(metadata, blob, raw_name)
    metadata.names.add(name)
    metadata.names.remove(old)


async def rename_store(metadata: Metadata, name: str) -> None:
    """Give the store another name. Raises: DrivebayError."""
    await _change_xattr(metadata, metadata.store_blob, check_name(name, "a store"))


async def _change_xattr(metadata: Metadata, blob: Blob, raw_name: bytes) -> None:
    await metadata.begin_change()
    old = blob.xattrs[b"name"]
    blob.xattrs[b"name"] = raw_name + b"\0"
    try:
        await metadata.persist(blob)
    except StoreError:
        blob.xattrs[b"name"] = old
        raise


async def set_read_only(metadata: Metadata, blob: Blob) -> None:
    """Its content never changes again. Raises: DrivebayError."""
    require_touchable(blob)
    if blob.data_ro_flags & layout.READ_ONLY:
        return
    await metadata.begin_change()
    blob.data_ro_flags |= layout.READ_ONLY
    try:
        await metadata.persist(blob)
    except StoreError:
        blob.data_ro_flags &= ~layout.READ_ONLY
        raise


def check_resize(metadata: Metadata, blob: Blob, size: int) -> int:
    """How many clusters it would have. Raises: StoreError."""
    _require_writable(blob, "resized")
    if not blob.thin:
        wanted = divide_up(size, metadata.sb.cluster_bytes) - blob.table.num_clusters
        _check_free(metadata, wanted, f"volume '{blob.name}' of {size} bytes")
    return clusters_for(metadata, size)


async def resize(metadata: Metadata, blob: Blob, size: int) -> Dead | None:
    """Make it larger or smaller. Raises: DrivebayError.

    A smaller one: the answer is to be cleared and released, and the table is only then smaller.
    """
    count = check_resize(metadata, blob, size)
    old = blob.table.num_clusters
    if count == old:
        return None
    await metadata.begin_change()
    if count < old:
        await _cut(metadata, blob, count)
        return Dead(blob.table, count, blob.clear_method, cut=True)
    blob.table.resize(count)
    try:
        await _extend(metadata, blob, old)
    except StoreError:
        metadata.release(Dead(blob.table, old, CLEAR_DEFAULT))
        blob.table.resize(old)
        raise
    return None


async def _replace_last(metadata: Metadata, blob: Blob, edge: int, count: int) -> list[int]:
    """The extent page in which ``edge`` lies gets a copy with another number of entries.

    Returns its old number, for give_pages() when the new one counts.
    """
    pages = blob.table.extent_pages
    index = edge // ENTRIES_A_PAGE
    if pages is None or edge % ENTRIES_A_PAGE == 0 or not pages[index]:
        return []
    old = pages[index]
    [pages[index]] = metadata.take_pages(1, errno.ENOSPC)
    await metadata.write_extent_page(blob, index, pages[index], count)
    return [old]


async def _extend(metadata: Metadata, blob: Blob, old: int) -> None:
    before = list(blob.table.extent_pages or ())
    replaced: list[int] = []
    try:
        if not blob.thin:
            _allocate(metadata, blob, old)
        count = blob.table.num_clusters
        replaced = await _replace_last(metadata, blob, old, count)
        for index, number in enumerate(blob.table.extent_pages or ()):
            if number and index * ENTRIES_A_PAGE >= old:
                await metadata.write_extent_page(blob, index, number)
        await metadata.persist(blob)
    except StoreError:
        now = blob.table.extent_pages
        if now is not None:
            metadata.give_pages(set(now) - set(before))
            now[: len(before)] = array("I", before)
        raise
    metadata.give_pages(replaced)


async def _cut(metadata: Metadata, blob: Blob, count: int) -> None:
    pages = blob.table.extent_pages
    before = list(pages or ())
    keep = extent_page_count(count)
    try:
        replaced = await _replace_last(metadata, blob, count, count)
        await metadata.persist(blob, count)
    except StoreError:
        if pages is not None:
            metadata.give_pages(set(pages) - set(before))
            pages[:] = array("I", before)
        raise
    metadata.give_pages(replaced + before[keep:])
