"""Making a new store on a disk, as SPDK lays it out. What was on the disk is lost."""

from __future__ import annotations

import errno
from typing import Final
from uuid import UUID

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.layout import StoreError, Super, mask_pages
from drivebay.bdev.lvol.metadata import (
    CLEAR_NONE,
    CLEAR_UNMAP,
    CLEAR_ZEROES,
    Device,
    MakeTable,
    Metadata,
)
from drivebay.bdev.lvol.volumes import check_name

DEFAULT_CLUSTER: Final = 4 << 20
DEFAULT_PAGES_PERCENT: Final = 100
LARGEST_PAGE: Final = 65536


def _invalid(message: str, hint: str | None = None) -> StoreError:
    return StoreError(errno.EINVAL, message, hint=hint)


def plan(
    device_bytes: int,
    block_bytes: int,
    *,
    cluster_bytes: int = 0,
    pages_percent: int = 0,
    page_bytes: int = 0,
) -> Super:
    """The super block of a new store; 0 means SPDK's default. Raises: StoreError.

    ``pages_percent`` is num_md_pages_per_cluster_ratio.
    """
    cluster_bytes = cluster_bytes or DEFAULT_CLUSTER
    pages_percent = pages_percent or DEFAULT_PAGES_PERCENT
    if page_bytes and not (
        layout.PAGE <= page_bytes <= LARGEST_PAGE and page_bytes & (page_bytes - 1) == 0
    ):
        raise _invalid(
            f"metadata pages of {page_bytes} bytes: 4096 to 65536 are possible, in powers of two"
        )
    page_bytes = max(page_bytes, layout.PAGE)
    if layout.PAGE % block_bytes:
        raise _invalid(f"the base has blocks of {block_bytes} bytes; a store needs 4096 or less")
    if cluster_bytes % layout.PAGE or cluster_bytes < block_bytes:
        raise _invalid(f"clusters of {cluster_bytes} bytes are no multiple of 4096")
    total = device_bytes // cluster_bytes
    md_len = pages_percent * total // 100
    if md_len == 0:
        raise _invalid(
            f"{device_bytes} bytes hold {total} clusters of {cluster_bytes} bytes, "
            f"and {pages_percent} % of that are no metadata page",
            "take a smaller cluster_sz",
        )
    if cluster_bytes < page_bytes:
        raise _invalid(f"clusters of {cluster_bytes} bytes with metadata pages of {page_bytes}")
    if md_len >= layout.NO_PAGE:
        raise _invalid(f"{md_len} metadata pages are too many", "take a larger cluster_sz")
    pages = mask_pages(md_len, page_bytes)
    clusters = mask_pages(total, page_bytes)
    room = max(clusters, pages)  # the store may grow
    sb = Super(
        version=layout.VERSION,
        length=layout.PAGE,
        clean=0,
        super_blob=layout.ID_BIT,
        cluster_bytes=cluster_bytes,
        page_mask_start=1,
        page_mask_len=pages,
        cluster_mask_start=1 + pages,
        cluster_mask_len=clusters,
        md_start=1 + pages + room + pages,
        md_len=md_len,
        store_type=layout.STORE_TYPE,
        blob_mask_start=1 + pages + room,
        blob_mask_len=pages,
        size=device_bytes,
        io_unit=block_bytes,
        page_bytes=page_bytes,
    )
    if sb.metadata_clusters > total:
        raise StoreError(
            errno.ENOMEM,
            f"the metadata would take {sb.metadata_clusters} clusters of {total}",
            hint="take a smaller num_md_pages_per_cluster_ratio",
        )
    return sb


async def create_store(
    device: Device,
    make_table: MakeTable,
    name: str,
    uuid: UUID,
    sb: Super,
    clear_method: int = CLEAR_UNMAP,
) -> Metadata:
    """Write a new store; the super block comes last. Raises: DrivebayError."""
    check_name(name, "a store")
    begin = sb.page_offset(sb.md_len)
    await device.write_zeroes(0, begin)
    await device.flush()
    if clear_method != CLEAR_NONE and begin < device.size:
        clear = device.write_zeroes if clear_method == CLEAR_ZEROES else device.unmap
        await clear(begin, device.size - begin)
    metadata = Metadata(device, sb, make_table)
    blob = metadata.new_store_blob(name, uuid)
    metadata.blobs[blob.id] = blob
    await metadata.persist(blob)
    await metadata.write_super(sb)
    return metadata
