"""A store's metadata in memory, and the ordered writes that change it on disk.

The order makes a power cut harmless: pages that nothing refers to yet, a flush, then the one page
that makes them count (a blob's root, in place), a flush. Whoever changes something calls
begin_change() first, which marks the super block unclean; the used masks are written only when
the store is closed. When a write fails, what is on disk is no longer known: nothing is changed
after that until the store is opened again. What first writes need is simpler: a failed one leaves
one blob's chain or one extent page unknown, and writing that again puts it right.

Context: control; the store's space is frozen meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.blob import Blob, Table, write_chain
from drivebay.bdev.lvol.layout import Page, StoreError, Super
from drivebay.errors import DrivebayError

if TYPE_CHECKING:
    from uuid import UUID

    from drivebay.bdev.lvol.table import ClusterTable

__all__ = ["CLEAR_DEFAULT", "CLEAR_NONE", "CLEAR_UNMAP", "CLEAR_ZEROES", "Metadata"]

CLEAR_DEFAULT, CLEAR_NONE, CLEAR_UNMAP, CLEAR_ZEROES = range(4)  # on disk
WRITE_BYTES: Final = 1 << 20


class Device(Protocol):
    """What the metadata lies on."""

    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: Any) -> None: ...
    async def flush(self) -> None: ...
    async def unmap(self, offset: int, length: int) -> None: ...
    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = ...) -> None: ...


class FreeClusters(Protocol):
    """The free clusters; at run time a FreeMap."""

    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def used(self) -> memoryview[int]: ...
    def recount(self) -> None: ...
    def grow(self, total: int) -> None: ...
    def allocate(self, table: Any, first: int, count: int) -> list[tuple[int, int]]: ...
    def release(self, table: Any, first: int, count: int) -> list[tuple[int, int]]: ...


MakeTable = Callable[[int, int, bool], Table]


@dataclass
class Dead:
    """Clusters that belong to nothing on disk any more: to be cleared, then released."""

    table: Table
    first: int
    clear_method: int
    cut: bool = False  # the table goes on without them


class Metadata:
    """Everything that the store's metadata says."""

    def __init__(self, device: Device, sb: Super, make_table: MakeTable) -> None:
        from drivebay.bdev.lvol.free_map import FreeMap  # compiled; loaded with the first store

        self.device = device
        self.sb = sb
        self.make_table = make_table
        self.blobs: dict[int, Blob] = {}
        self.names: set[str] = set()  # of the volumes
        self.clones: dict[int, list[int]] = {}  # of each snapshot that ever had one
        self.used_pages = bytearray(sb.md_len)  # a byte of 0 or 1 for each
        self.failure: DrivebayError | None = None
        self.flushes = 0  # how many succeeded
        self._flush_failed = False
        self._unsure: dict[int, list[int]] = {}  # blobs by id: pages that their chains may have
        self.unsealed: list[int] = []  # extent pages that a torn write would end
        self.copies: set[int] = set()  # pages with copies of others, see layout.pack_copy
        self.copy_count = 0
        self.free: FreeClusters = FreeMap(sb.total_clusters)
        for cluster in range(sb.metadata_clusters):
            self.free.used[cluster >> 3] |= 1 << (cluster & 7)
        self.free.recount()

    # Looking

    @property
    def store_blob(self) -> Blob:
        """The one with the store's name and uuid."""
        return self.blobs[self.sb.super_blob]

    def new_store_blob(self, name: str, uuid: UUID) -> Blob:
        """The blob of a new store: it has no clusters, only xattrs."""
        self.used_pages[0] = 1
        blob = Blob(self.sb.super_blob, self.make_table(0, self.sb.super_blob, True), pages=[0])
        blob.invalid_flags = layout.HAS_EXTENT_TABLE
        blob.xattrs[b"uuid"] = str(uuid).encode() + b"\0"
        blob.xattrs[b"name"] = name.encode() + b"\0"
        return blob

    @property
    def name(self) -> str:
        """The store's name."""
        return self.store_blob.name

    @property
    def uuid(self) -> UUID:
        """The store's uuid."""
        uuid = self.store_blob.uuid
        assert uuid is not None  # load() has seen it
        return uuid

    @property
    def total_data_clusters(self) -> int:
        """All clusters but those of the metadata."""
        return self.sb.total_clusters - self.sb.metadata_clusters

    def volumes(self) -> Iterator[Blob]:
        """All blobs that are volumes."""
        return (blob for blob in self.blobs.values() if blob.id != self.sb.super_blob)

    def is_snapshot(self, blob: Blob) -> bool:
        """Whether clones stand on it, or did while the store was open: SPDK's meaning."""
        return blob.id in self.clones

    def clones_of(self, blob: Blob) -> list[Blob]:
        """The volumes that read from it directly."""
        return [self.blobs[clone] for clone in self.clones.get(blob.id, ())]

    def parent_of(self, blob: Blob) -> Blob | None:
        """The snapshot that it reads from."""
        return self.blobs[blob.parent_id] if blob.parent_id is not None else None

    def link(self, blob: Blob) -> None:
        """Note a blob among the clones of its parent."""
        if blob.parent_id is not None:
            self.clones.setdefault(blob.parent_id, []).append(blob.id)

    def unlink(self, blob: Blob) -> None:
        """Forget it there."""
        if blob.parent_id is not None:
            self.clones[blob.parent_id].remove(blob.id)

    # Pages

    def free_page_count(self) -> int:
        """How many metadata pages are free."""
        return self.used_pages.count(0)

    def take_pages(self, count: int, code: int = errno.ENOMEM) -> list[int]:
        """Claim the lowest free ones. Raises: StoreError (``code``), none is claimed then."""
        found: list[int] = []
        position = 0  # which holds the store's name, and as an extent page would mean none
        while len(found) < count:
            position = self.used_pages.find(0, position + 1)
            if position < 0:
                raise StoreError(
                    code,
                    f"store '{self.name}' has no free metadata page left",
                    hint="delete volumes, or make stores with a larger "
                    "num_md_pages_per_cluster_ratio",
                )
            found.append(position)
        for number in found:
            self.used_pages[number] = 1
        return found

    def give_pages(self, pages: Iterable[int]) -> None:
        """They are free again; 0 stands for none."""
        for number in pages:
            if number:
                self.used_pages[number] = 0

    # Ordered writes

    def require_changeable(self) -> None:
        """Raises: StoreError (EIO) after a failed write."""
        if self.failure is not None:
            raise StoreError(
                errno.EIO,
                f"store '{self.name}' takes no changes since a write of its metadata "
                f"failed ({self.failure})",
                hint="delete its base bdev and create it again; the store opens with it",
            )

    @property
    def is_known(self) -> bool:
        """Whether the disk says what is in memory, as far as failed writes go."""
        return self.failure is None and not self._unsure

    async def begin_change(self) -> None:
        """The super block says unclean before anything else changes. Raises: DrivebayError."""
        await self.heal([])
        if self.sb.clean:
            await self.write_super(replace(self.sb, clean=0))

    async def open(self) -> None:
        """Before the first change: what a load found is stable, and no torn write will lose it.

        Raises: DrivebayError.
        """
        from drivebay.bdev.lvol.extent_page import seal  # compiled; loaded with the first store

        await self.write_super(replace(self.sb, clean=0))
        if self.device.block_size < layout.PAGE and self.unsealed:
            for number in self.unsealed:
                image = await self.device.read(self.sb.page_offset(number), self.sb.page_bytes)
                await self.write_page(number, seal(image))
            await self.flush()
        self.unsealed = []

    async def write_super(self, sb: Super) -> None:
        """Write it, flush it, and go by it from now on. Raises: DrivebayError."""
        size = max(layout.PAGE, self.device.block_size)
        await self._write(0, sb.pack().ljust(size, b"\0"))
        await self.flush()
        self.sb = sb

    async def _write(self, offset: int, data: bytes) -> None:
        try:
            await self.device.write(offset, data)
        except DrivebayError as error:
            self.failure = error
            raise

    async def flush(self) -> None:
        """What was written is stable. Raises: DrivebayError."""
        try:
            await self.device.flush()
        except DrivebayError as error:
            self.failure = error
            self._flush_failed = True  # who knows what of all that was written is lost
            raise
        self.flushes += 1

    @contextlib.contextmanager
    def repeatable(self, blob: Blob) -> Iterator[None]:
        """A change of one blob that ends with its persist(); an error is mended by another one."""
        try:
            yield
        except DrivebayError:
            if not self._flush_failed:
                self.failure = None
            raise

    def drop_pages(self, blob: Blob, numbers: Iterable[int]) -> None:
        """Free pages that the blob was to have, when no chain on disk can name them."""
        if blob.id in self._unsure:
            self._unsure[blob.id] += numbers
        else:
            self.give_pages(numbers)

    async def heal(self, pages: Sequence[tuple[Blob, int]]) -> None:
        """Write again what failed writes left unknown: chains, and these extent pages of blobs.

        Raises: DrivebayError; it can be tried again then, unless changes are over for good.
        """
        self.require_changeable()
        for blob_id in list(self._unsure):
            with self.repeatable(self.blobs[blob_id]):
                await self.persist(self.blobs[blob_id])
        if not pages:
            return
        await self.flush()  # the seals will say that what the tables have is stable
        for blob, index in pages:
            assert blob.table.extent_pages is not None
            with self.repeatable(blob):
                await self.write_extent_page(blob, index, blob.table.extent_pages[index])
        await self.flush()

    async def write_page(self, number: int, data: bytes) -> None:
        """Write one metadata page. Raises: DrivebayError."""
        await self._write(self.sb.page_offset(number), data.ljust(self.sb.page_bytes, b"\0"))

    async def _copy_page(self, number: int, image: bytes) -> None:
        """Before a page is overwritten in place: a copy of what it will be, if blocks can tear.

        The flush before the overwriting makes it stable. Without a free page there is none.
        """
        place = self.used_pages.rfind(0)
        if self.device.block_size >= layout.PAGE or place <= 0:
            return
        self.copy_count += 1
        self.copies.add(place)
        await self.write_page(place, layout.pack_copy(image, number, self.copy_count))

    async def zero_page(self, number: int) -> None:
        """Take a root page off the disk, for good. Raises: DrivebayError."""
        await self._copy_page(number, bytes(layout.PAGE))
        await self.flush()
        await self.write_page(number, b"")
        await self.flush()

    async def write_extent_page(
        self, blob: Blob, index: int, number: int, num_clusters: int | None = None
    ) -> None:
        """Write an extent page of the blob as its table is now. Raises: DrivebayError."""
        from drivebay.bdev.lvol.extent_page import draw  # compiled; loaded with the first store

        count = blob.table.num_clusters if num_clusters is None else num_clusters
        await self.write_page(number, draw(cast("ClusterTable", blob.table), index, count))

    async def move_extent_pages(self, blob: Blob, indexes: Sequence[int]) -> None:
        """Write those whose entries have changed or gone to other places, and the root.

        Raises: DrivebayError.
        """
        pages = blob.table.extent_pages
        old: list[int] = []
        if pages is not None:
            for index, number in zip(indexes, self.take_pages(len(indexes)), strict=True):
                old.append(pages[index])
                pages[index] = number
                await self.write_extent_page(blob, index, number)
        await self.persist(blob)
        self.give_pages(old)

    async def persist(
        self,
        blob: Blob,
        num_clusters: int | None = None,
        clusters: Sequence[int] | None = None,
    ) -> None:
        """Make the blob on disk what it is in memory; its extent pages are written already.

        ``num_clusters`` and ``clusters``: what the table is about to have. Raises: StoreError
        (ENOMEM) before anything is written; DrivebayError.
        """
        count = blob.table.num_clusters if num_clusters is None else num_clusters
        bodies = write_chain(blob, count, clusters)
        old = blob.pages[1:]
        new = self.take_pages(len(bodies) - 1)
        unsure = self._unsure.setdefault(blob.id, [])
        numbers = [blob.root, *new]
        images = [
            Page(blob.id, sequence, body, following).pack()
            for sequence, (body, following) in enumerate(
                zip(bodies, [*new, layout.NO_PAGE], strict=True)
            )
        ]
        unsure += new
        for number, image in zip(numbers[1:], images[1:], strict=True):
            await self.write_page(number, image)
        await self._copy_page(blob.root, images[0])
        await self.flush()
        await self.write_page(blob.root, images[0])
        await self.flush()
        blob.pages = numbers
        del self._unsure[blob.id]
        self.give_pages({*old, *unsure}.difference(new))

    # Clusters that are no longer used

    async def clear(self, dead: Dead) -> None:
        """Give what lies in them back to the base, as the volume wishes. Raises: DrivebayError."""
        if dead.clear_method == CLEAR_NONE:
            return
        clear = self.device.unmap
        if dead.clear_method == CLEAR_ZEROES:
            clear = self.device.write_zeroes
        size = self.sb.cluster_bytes
        for first, count in cluster_runs(dead.table, dead.first):
            await clear(first * size, count * size)

    def release(self, dead: Dead) -> list[tuple[int, int]]:
        """They are free: (first, count) of those in a row. The space is frozen."""
        runs = self.free.release(dead.table, dead.first, dead.table.num_clusters - dead.first)
        if dead.cut:
            dead.table.resize(dead.first)
        return runs

    # The store as a whole

    async def close(self) -> None:
        """Write the used masks and mark the store clean. Raises: DrivebayError."""
        await self.heal([])
        sb = self.sb
        if sb.clean:
            return
        roots = bytearray(sb.md_len)
        for blob in self.blobs.values():
            roots[blob.root] = 1
        pages, blobs = layout.bits_from_flags(self.used_pages), layout.bits_from_flags(roots)
        masks = [
            (layout.MASK_PAGES, sb.page_mask_start, sb.page_mask_len, sb.md_len, pages),
            (
                layout.MASK_CLUSTERS,
                sb.cluster_mask_start,
                sb.cluster_mask_len,
                sb.total_clusters,
                bytes(self.free.used),
            ),
        ]
        if sb.blob_mask_len:
            masks.append(
                (layout.MASK_BLOBS, sb.blob_mask_start, sb.blob_mask_len, sb.md_len, blobs)
            )
        for kind, start, length, bits, used in masks:
            data = layout.pack_mask(kind, bits, used, length, sb.page_bytes)
            for offset in range(0, len(data), WRITE_BYTES):
                part = data[offset : offset + WRITE_BYTES]
                await self._write(start * sb.page_bytes + offset, part)
        for number in self.copies:
            if not self.used_pages[number]:
                await self.write_page(number, b"")
        self.copies.clear()
        await self.flush()
        await self.write_super(replace(sb, clean=1))

    async def grow(self) -> bool:
        """Take what the base has become larger by; whether it has.

        Raises: StoreError (ENOSPC) when it is smaller, or the mask of clusters can't grow so far.
        """
        await self.heal([])
        sb = self.sb
        grown = replace(sb, clean=0, size=self.device.size)
        if grown.size == sb.size:
            return False
        pages = layout.mask_pages(grown.total_clusters, sb.page_bytes)
        if grown.size < sb.size or pages > sb.cluster_mask_room:
            raise StoreError(
                errno.ENOSPC,
                f"store '{self.name}' has {sb.size} bytes and can't become {grown.size}; "
                f"it can grow to {sb.max_growable} at most",
            )
        await self.write_super(replace(grown, cluster_mask_len=max(pages, sb.cluster_mask_len)))
        self.free.grow(self.sb.total_clusters)
        return True


def bits_of(used: bytes | bytearray | memoryview) -> int:
    """A bitmap as one number."""
    return int.from_bytes(bytes(used), "little")


def own_clusters(table: Table, first: int = 0) -> Iterator[int]:
    """Each allocated cluster from entry ``first`` on; missing parts cost no time."""
    pages = table.extent_pages
    if pages is None:
        yield from filter(None, table.clusters[first:])
        return
    clusters = table.clusters
    for index, number in enumerate(pages):
        end = (index + 1) * layout.ENTRIES_A_PAGE
        if number and end > first:
            start = max(first, end - layout.ENTRIES_A_PAGE)
            yield from filter(None, clusters[start:end])


def cluster_runs(table: Table, first: int) -> list[tuple[int, int]]:
    """The same as (first, count), in the order of the base."""
    found: list[tuple[int, int]] = []
    for cluster in sorted(own_clusters(table, first)):
        if found and sum(found[-1]) == cluster:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((cluster, 1))
    return found
