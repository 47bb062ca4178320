"""Opening a store: everything is read and checked before anything is written.

A store that was closed properly has masks of its used pages, clusters and blobs; the pages it
names are read. Otherwise all of the metadata region is searched for blobs, as SPDK's recovery
does. Either way what is used is then counted from the blobs themselves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.blob import (
    MAX_CLUSTERS,
    Blob,
    Draft,
    Table,
    consecutive,
    extent_page_count,
    read_chain,
    read_extent_page,
)
from drivebay.bdev.lvol.layout import Page, StoreError, Super, damaged
from drivebay.bdev.lvol.lifelong import lifelong
from drivebay.bdev.lvol.metadata import Device, MakeTable, Metadata, bits_of, own_clusters

__all__ = ["load", "read_super"]

_log = logging.getLogger(__name__)

READ_BYTES: Final = 1 << 20
TOTAL_CLUSTERS: Final = 1 << 31  # of all volumes together, missing ones included


async def read_super(device: Device) -> Super:
    """Read the super block of a disk. Raises: StoreError, HostError."""
    length = max(layout.PAGE, device.block_size)
    if device.size < length:
        raise StoreError(errno.EILSEQ, "there is no blobstore here: the disk is too small for one")
    data = await device.read(0, length)
    return layout.unpack_super(data[: layout.PAGE], device.size, device.block_size)


async def load(device: Device, make_table: MakeTable) -> Metadata:
    """Read a store, check it, and finish or undo what a power cut interrupted.

    Raises: StoreError, HostError; nothing has been written then.
    """
    loader = _Loader(device, await read_super(device), make_table)
    await loader.read()
    with lifelong():
        metadata = await asyncio.to_thread(loader.build)
    await _repair(metadata, loader)
    return metadata


@dataclass
class _Loader:
    device: Device
    sb: Super
    make_table: MakeTable
    pages: dict[int, Page] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    drafts: dict[int, tuple[Draft, list[int]]] = field(default_factory=dict)
    known_pages: bytearray | None = None  # the masks of a clean store
    known_clusters: bytes | None = None
    copies: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)  # by their page
    unsound: dict[int, bool] = field(default_factory=dict)  # whether it claims to be a root
    torn: dict[int, bytes] = field(default_factory=dict)  # pages, and what they should be
    unsealed: set[int] = field(default_factory=set)  # extent pages, if they are any
    undone: dict[int, list[int]] = field(default_factory=dict)  # by clone: its extent pages
    dropped: list[int] = field(default_factory=list)  # roots of half-made or half-deleted ones
    kept: list[tuple[int, int, bool]] = field(default_factory=list)  # snapshot, clone, removal

    # What is on disk

    async def read(self) -> None:
        from drivebay.bdev.lvol.extent_page import is_sealed  # compiled

        sb = self.sb
        if sb.clean and sb.blob_mask_len:
            blobs = await self._mask(
                layout.MASK_BLOBS, sb.blob_mask_start, sb.blob_mask_len, sb.md_len
            )
            found = await self._mask(
                layout.MASK_PAGES, sb.page_mask_start, sb.page_mask_len, sb.md_len
            )
            self.known_clusters = await self._mask(
                layout.MASK_CLUSTERS, sb.cluster_mask_start, sb.cluster_mask_len, sb.total_clusters
            )
            self.known_pages = layout.flags_from_bits(found, sb.md_len)
            flags = layout.flags_from_bits(blobs, sb.md_len)
            position = flags.find(1)
            while position >= 0:
                self.roots.append(position)
                position = flags.find(1, position + 1)
        async for number, data in self._sound_pages():
            page = layout.unpack_page(data)
            if page is not None:
                self.pages[number] = page
                if not is_sealed(data):
                    self.unsealed.add(number)
            elif self.known_pages is None:
                self._note_unsound(number, data)
        if self.known_pages is None:
            self._mend_torn()
            _log.warning("an lvol store was not closed properly: its used maps are made anew")
            self.roots = [
                number
                for number, page in self.pages.items()
                if page.sequence == 0 and page.blob_id == layout.ID_BIT | number
            ]

    def _note_unsound(self, number: int, data: memoryview) -> None:
        from drivebay.bdev.lvol.extent_page import mend  # compiled

        copy = layout.unpack_copy(data)
        if copy is not None:
            self.copies[number] = copy
            return
        mended = mend(data)
        page = layout.unpack_page(mended) if mended is not None else None
        if mended is not None and page is not None:
            self.pages[number], self.torn[number] = page, mended
            return
        blob_id, sequence = struct.unpack_from("<QI", data)
        self.unsound[number] = (blob_id, sequence) == (layout.ID_BIT | number, 0)

    def _mend_torn(self) -> None:
        """The last page that was overwritten in place may be torn; its copy says what it is.

        Raises: StoreError for another root page that is not sound: its volume would be lost.
        """
        if self.copies:
            _, target, image = max(self.copies.values())
            if target in self.unsound:
                self.torn[target] = image
                del self.unsound[target]
                page = layout.unpack_page(image)
                if page is not None:
                    self.pages[target] = page
        lost = [number for number, is_root in self.unsound.items() if is_root]
        if lost:
            raise damaged(f"the checksum of blob {lost[0]}'s first page is wrong")

    async def _mask(self, kind: int, start: int, length: int, bits: int) -> bytes:
        needed = layout.mask_pages(bits, self.sb.page_bytes) * self.sb.page_bytes
        data = bytearray()
        while len(data) < min(needed, length * self.sb.page_bytes):
            part = min(READ_BYTES, needed - len(data))
            data += await self.device.read(start * self.sb.page_bytes + len(data), part)
        larger = kind == layout.MASK_CLUSTERS  # SPDK's grow may have been interrupted
        return layout.unpack_mask(kind, bits, bytes(data), at_least=larger)

    async def _sound_pages(self) -> AsyncIterator[tuple[int, memoryview]]:
        """Pages that may hold something, read in large pieces."""
        step = self.sb.page_bytes
        zeroes = bytes(layout.PAGE)
        for first, count in self._page_runs(max(1, READ_BYTES // step)):
            data = await self.device.read(self.sb.page_offset(first), count * step)
            if data.count(0) == len(data):
                continue
            view = memoryview(data)
            for index in range(count):
                page = view[index * step : index * step + layout.PAGE]
                if page != zeroes:
                    yield first + index, page

    def _page_runs(self, longest: int) -> list[tuple[int, int]]:
        runs = []
        flags = self.known_pages
        position = 0 if flags is None else flags.find(1)
        while 0 <= position < self.sb.md_len:
            end = min(position + longest, self.sb.md_len)
            if flags is None:
                following = end
            else:
                end = flags.rfind(1, position, end) + 1
                following = flags.find(1, end)
            runs.append((position, end - position))
            position = following
        return runs

    # What it means

    def build(self) -> Metadata:
        """Raises: StoreError."""
        self._read_chains()
        self._find_interrupted()
        metadata = Metadata(self.device, self.sb, self.make_table)
        total = 0
        for blob_id, (draft, chain) in self.drafts.items():
            metadata.blobs[blob_id] = blob = self._make_blob(blob_id, draft, chain)
            if blob.thin:
                numbers = set(blob.table.extent_pages or ()) - {0}
                metadata.unsealed += sorted(numbers & self.unsealed)
            total += blob.table.num_clusters
            if total > TOTAL_CLUSTERS:
                raise damaged(f"its volumes have more than {TOTAL_CLUSTERS} clusters together")
        self._undo_merges(metadata)
        self._claim_all(metadata)
        self._check_family(metadata)
        self._check_names(metadata)
        return metadata

    def _read_chains(self) -> None:
        taken = bytearray(self.sb.md_len)
        for root in self.roots:
            chain, pages = [root], [self._page_of_chain(root, root, 0)]
            taken[root] = 1
            while (number := pages[-1].next) != layout.NO_PAGE:
                pages.append(self._page_of_chain(root, number, len(pages)))
                if taken[number]:
                    raise damaged(f"page {number} is in two chains, or twice in one")
                taken[number] = 1
                chain.append(number)
            self.drafts[layout.ID_BIT | root] = read_chain(root, pages), chain

    def _page_of_chain(self, root: int, number: int, sequence: int) -> Page:
        page = self.pages.get(number)
        if page is None or number >= self.sb.md_len:
            raise damaged(f"blob {root}: page {number} is not there, or its checksum is wrong")
        if page.blob_id != layout.ID_BIT | root or page.sequence != sequence:
            raise damaged(
                f"blob {root}: page {number} should be its page {sequence}, but says that it is "
                f"page {page.sequence} of blob {page.blob_id & 0xFFFFFFFF}"
            )
        return page

    def _find_interrupted(self) -> None:
        """A snapshot whose making or removal a power cut interrupted counts if its clone says so.

        SPDK writes the snapshot first with a mark that names the clone, then the clone, then the
        snapshot again without the mark (or not at all, when it is deleted).
        """
        for blob_id, (draft, _) in list(self.drafts.items()):
            removal = layout.REMOVAL_BEGUN in draft.internal
            mark = layout.REMOVAL_BEGUN if removal else layout.SNAPSHOT_BEGUN
            if mark not in draft.internal:
                continue
            clone_id = int.from_bytes(draft.internal[mark], "little")
            if clone_id not in self.drafts or clone_id == blob_id:
                raise damaged(f"blob {blob_id & 0xFFFFFFFF} names a clone that is not there")
            reference = self.drafts[clone_id][0].internal.get(layout.SNAPSHOT_OF, b"")
            if int.from_bytes(reference, "little") == blob_id:
                self.kept.append((blob_id, clone_id, removal))
            else:
                self.dropped.append(blob_id & 0xFFFFFFFF)
                del self.drafts[blob_id]

    def _make_blob(self, blob_id: int, draft: Draft, chain: list[int]) -> Blob:
        root = blob_id & 0xFFFFFFFF
        if draft.num_clusters is not None:
            table = self._table_of_pages(blob_id, draft, draft.num_clusters)
        else:
            table = self._table_of_runs(blob_id, draft)
        table.recount()
        if not draft.invalid_flags & layout.THIN and table.allocated != table.num_clusters:
            raise damaged(f"blob {root} is not thin, but clusters of it are missing")
        return Blob(
            blob_id,
            table,
            draft.invalid_flags,
            draft.data_ro_flags,
            draft.md_ro_flags,
            draft.xattrs,
            draft.internal,
            chain,
            draft.foreign,
        )

    def _new_table(self, blob_id: int, num_clusters: int, extent_table: bool) -> Table:
        if num_clusters > MAX_CLUSTERS:
            raise StoreError(
                errno.EFBIG,
                f"blob {blob_id & 0xFFFFFFFF} has {num_clusters} clusters; "
                f"this program can handle {MAX_CLUSTERS}",
            )
        return self.make_table(num_clusters, blob_id, extent_table)

    def _table_of_runs(self, blob_id: int, draft: Draft) -> Table:
        found = draft.runs or []
        table = self._new_table(blob_id, sum(count for _, count in found), False)
        clusters = table.clusters
        position = 0
        for first, count in found:
            if first + count > self.sb.total_clusters and first:
                raise damaged(f"blob {blob_id & 0xFFFFFFFF} has clusters past the end of its store")
            if first:
                clusters[position : position + count] = consecutive(first, count)
            position += count
        return table

    def _table_of_pages(self, blob_id: int, draft: Draft, num_clusters: int) -> Table:
        root = blob_id & 0xFFFFFFFF
        numbers = sum(count for _, count in draft.extents)
        if numbers != extent_page_count(num_clusters):
            raise damaged(f"blob {root}: {numbers} extent pages for {num_clusters} clusters")
        table = self._new_table(blob_id, num_clusters, True)
        clusters, extent_pages = table.clusters, table.extent_pages
        assert extent_pages is not None
        index = 0
        for number, count in draft.extents:
            if number:
                if count != 1 or number not in self.pages or number >= self.sb.md_len:
                    raise damaged(f"blob {root}: extent page {number} is not there")
                extent_pages[index] = number
                start, entries = read_extent_page(self.pages[number], number)
                if start != index * layout.ENTRIES_A_PAGE:
                    raise damaged(f"extent page {number} begins with cluster {start}, at {index}")
                # SPDK writes the page before the table: a cut between them leaves other lengths.
                here = clusters[start : start + len(entries)]
                here[:] = entries[: len(here)]
            index += count
        return table

    def _undo_merges(self, metadata: Metadata) -> None:
        """What a clone took over from a snapshot that now stays is not the clone's own."""
        for snapshot_id, clone_id, removal in self.kept:
            if not removal:
                continue
            ours = metadata.blobs[clone_id].table
            theirs = metadata.blobs[snapshot_id].table.clusters
            clusters = ours.clusters
            undone = set()
            for index in range(min(len(theirs), len(clusters))):
                if clusters[index] and clusters[index] == theirs[index]:
                    clusters[index] = 0
                    undone.add(index // layout.ENTRIES_A_PAGE)
            self.undone[clone_id] = sorted(undone)
            ours.recount()

    def _claim_all(self, metadata: Metadata) -> None:
        for blob in metadata.blobs.values():
            for number in (*blob.pages, *filter(None, blob.table.extent_pages or ())):
                if metadata.used_pages[number]:
                    raise damaged(f"page {number} is used twice, by blob {blob.root} too")
                if self.known_pages is not None and not self.known_pages[number]:
                    raise damaged(f"blob {blob.root} uses page {number}, which should be free")
                metadata.used_pages[number] = 1
        used = bytearray(metadata.free.used)
        total = self.sb.total_clusters
        for blob in metadata.blobs.values():
            if not blob.table.allocated:
                continue
            for cluster in own_clusters(blob.table):
                if cluster >= total:
                    raise damaged(f"blob {blob.root} has cluster {cluster} of {total}")
                byte, bit = cluster >> 3, 1 << (cluster & 7)
                if used[byte] & bit:
                    raise damaged(f"cluster {cluster} is used twice, by blob {blob.root} too")
                used[byte] |= bit
        if self.known_clusters is not None:
            missing = bits_of(used) & ~bits_of(self.known_clusters)
            if missing:
                raise damaged(f"cluster {missing.bit_length() - 1} is used, but should be free")
        metadata.free.used[:] = used
        metadata.free.recount()

    def _check_family(self, metadata: Metadata) -> None:
        done: set[int] = set()
        for blob_id in metadata.blobs:
            path: set[int] = set()
            current: int | None = blob_id
            while current is not None and current not in done:
                if current in path:
                    raise damaged(f"blob {current & 0xFFFFFFFF} is a clone of itself, by others")
                path.add(current)
                blob = metadata.blobs[current]
                parent = blob.parent_id
                if parent is not None:
                    if parent not in metadata.blobs or parent == self.sb.super_blob:
                        raise damaged(f"blob {blob.root} is a clone of one that is not there")
                    metadata.clones.setdefault(parent, []).append(current)
                current = parent
            done |= path

    def _check_names(self, metadata: Metadata) -> None:
        store = metadata.blobs.get(self.sb.super_blob)
        if store is None:
            raise damaged("the blob with the store's name is not there")
        if store.uuid is None:
            raise damaged("the store has no uuid")
        names = metadata.names
        uuids: set[UUID] = {store.uuid}
        for blob in (store, *metadata.volumes()):
            name = blob.name
            if blob is store:
                continue
            if name in names:
                raise damaged(f"two volumes are called '{name}'")
            names.add(name)
            uuid = blob.uuid
            if uuid is not None:
                if uuid in uuids:
                    raise damaged(f"the uuid of volume '{name}' is used twice")
                uuids.add(uuid)


async def _repair(metadata: Metadata, loader: _Loader) -> None:
    """All checks have passed: finish what was interrupted."""
    metadata.copies |= loader.copies.keys()
    metadata.copy_count = max((count for count, _, _ in loader.copies.values()), default=0)
    torn = {number: image for number, image in loader.torn.items() if metadata.used_pages[number]}
    if torn:
        _log.warning("a power cut tore pages %s of an lvol store: they are mended", sorted(torn))
        await metadata.begin_change()
        for number, image in torn.items():
            await metadata.write_page(number, image)
        await metadata.flush()
    for root in loader.dropped:
        _log.warning("page %d: a snapshot that was not finished is dropped", root)
        await metadata.begin_change()
        await metadata.zero_page(root)
    for snapshot_id, clone_id, removal in loader.kept:
        snapshot, clone = metadata.blobs[snapshot_id], metadata.blobs[clone_id]
        _log.warning("snapshot '%s' was not finished: it stays", snapshot.name)
        await metadata.begin_change()
        if removal:
            await metadata.move_extent_pages(clone, loader.undone[clone_id])
        snapshot.internal.pop(layout.REMOVAL_BEGUN, None)
        snapshot.internal.pop(layout.SNAPSHOT_BEGUN, None)
        snapshot.data_ro_flags |= layout.READ_ONLY
        await metadata.persist(snapshot)
