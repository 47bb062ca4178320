"""A disk in memory for lvol stores: it records what is written, and may lose or tear it."""

from __future__ import annotations

import errno
import functools
import lzma
from pathlib import Path
from typing import Any
from uuid import UUID

from drivebay.bdev.lvol import family
from drivebay.bdev.lvol.blob import Blob
from drivebay.bdev.lvol.creation import create_store, plan
from drivebay.bdev.lvol.extent_page import draw
from drivebay.bdev.lvol.layout import ENTRIES_A_PAGE
from drivebay.bdev.lvol.metadata import CLEAR_UNMAP, Dead, Metadata
from drivebay.bdev.lvol.table import ClusterTable
from drivebay.errors import HostError

DATA = Path(__file__).parent.parent / "data" / "lvol"
KIB = 1 << 10
MIB = 1 << 20


class MemoryDisk:
    """What bdev/lvol/metadata.py wants of a base.

    ``log`` has ("write", offset, data) and ("flush", 0, b"") in their order.
    """

    def __init__(self, content: bytes | bytearray, block_size: int = 512) -> None:
        self.content = bytearray(content)
        self.block_size = block_size
        self.log: list[tuple[str, int, bytes]] = []
        self.reads = 0
        self.fail_after: int | None = None  # writes until one fails
        self.fails_late = False  # it fails when the data is on the disk

    @property
    def size(self) -> int:
        return len(self.content)

    def _check(self, offset: int, length: int) -> None:
        assert offset % self.block_size == 0
        assert length % self.block_size == 0
        assert 0 <= offset < offset + length <= self.size

    async def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        self.reads += 1
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: Any) -> None:
        self._check(offset, len(data))
        if self.fail_after is not None:
            if self.fail_after == 0:
                if self.fails_late:
                    self.content[offset : offset + len(data)] = data
                raise HostError("write to a test's disk", errno.EIO)
            self.fail_after -= 1
        self.log.append(("write", offset, bytes(data)))
        self.content[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        await self.write(offset, bytes(length))

    async def unmap(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    async def flush(self) -> None:
        self.log.append(("flush", 0, b""))

    @property
    def writes(self) -> int:
        return sum(kind == "write" for kind, _, _ in self.log)


def make_table(num_clusters: int, blob_id: int, extent_table: bool) -> ClusterTable:
    """What a store passes to load() and create_store()."""
    return ClusterTable(num_clusters, blob_id, extent_table=extent_table)


def fixture(name: str, block_size: int) -> MemoryDisk:
    """A disk that SPDK wrote."""
    return MemoryDisk(_image(name), block_size)


@functools.cache
def _image(name: str) -> bytes:
    return lzma.decompress((DATA / f"{name}.img.xz").read_bytes())


async def new_store(
    size: int = 4 * MIB,
    cluster: int = 16 * KIB,
    *,
    block_size: int = 512,
    percent: int = 0,
    page_bytes: int = 0,
    name: str = "lvs",
) -> Metadata:
    """A new store on a disk in memory; its device is metadata.device."""
    disk = MemoryDisk(bytes(size), block_size)
    sb = plan(size, block_size, cluster_bytes=cluster, pages_percent=percent, page_bytes=page_bytes)
    return await create_store(disk, make_table, name, UUID(int=1), sb, CLEAR_UNMAP)


def named(metadata: Metadata, name: str) -> Blob:
    """A volume by name."""
    return next(blob for blob in metadata.volumes() if blob.name == name)


def read_cluster(metadata: Metadata, blob: Blob, index: int) -> bytes | None:
    """What a volume reads there: a plain second implementation; None for an external parent."""
    size = metadata.sb.cluster_bytes
    current: Blob | None = blob
    while current is not None and index < current.table.num_clusters:
        cluster = current.table.clusters[index]
        if cluster:
            content: bytearray = metadata.device.content  # type: ignore[attr-defined]
            return bytes(content[cluster * size : (cluster + 1) * size])
        if current.external_id is not None:
            return None
        current = metadata.parent_of(current)
    return bytes(size)


async def fill(metadata: Metadata, blob: Blob, index: int, tag: int) -> None:
    """What the owner of the space does at a first write, and the write."""
    disk, size = metadata.device, metadata.sb.cluster_bytes
    table = blob.table
    assert isinstance(table, ClusterTable)
    if not table.clusters[index]:
        await metadata.begin_change()
        if table.extent_pages is None:
            metadata.free.allocate(table, index, 1)
            cluster = table.clusters[index]
            table.clusters[index] = 0
            await disk.write(cluster * size, pattern(metadata, tag))
            await disk.flush()
            try:
                await family.save_clusters(metadata, blob, {index: cluster})
            finally:
                table.clusters[index] = cluster
                if not metadata.is_known:
                    metadata.free.release(table, index, 1)
            return
        if not table.extent_pages[index // ENTRIES_A_PAGE]:
            await family.add_extent_pages(metadata, blob, [index // ENTRIES_A_PAGE])
        page = index // ENTRIES_A_PAGE
        metadata.free.allocate(table, index, 1)
        cluster = table.clusters[index]
        table.set(index, 0)
        await disk.write(cluster * size, pattern(metadata, tag))
        await disk.flush()
        image = draw(table, page, table.num_clusters, {index: cluster})
        await metadata.write_page(table.extent_pages[page], image)
        table.set(index, cluster)
    else:
        await disk.write(table.clusters[index] * size, pattern(metadata, tag))
    await disk.flush()


def pattern(metadata: Metadata, tag: int) -> bytes:
    """A cluster full of a tag."""
    return tag.to_bytes(8, "little") * (metadata.sb.cluster_bytes // 8)


async def bury(metadata: Metadata, dead: Dead | None) -> None:
    """Clear and release what a change left over."""
    if dead is not None:
        await metadata.clear(dead)
        metadata.release(dead)


def describe(metadata: Metadata) -> dict[str, Any]:
    """Everything that may not change by itself, volumes by name."""
    found: dict[str, Any] = {"": (metadata.name, metadata.uuid, metadata.sb.size)}
    for blob in metadata.volumes():
        parent = metadata.parent_of(blob)
        found[blob.name] = (
            blob.uuid,
            blob.thin,
            blob.data_read_only,
            blob.clear_method,
            blob.external_id,
            parent and parent.name,
            [
                content and int.from_bytes(content[:8], "little")
                for content in (
                    read_cluster(metadata, blob, index) for index in range(blob.table.num_clusters)
                )
            ],
        )
    return found
