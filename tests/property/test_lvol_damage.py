"""Whatever a disk says that it is, opening it ends with a store or with a sentence."""

from __future__ import annotations

import asyncio
import functools
import random
import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.bdev.lvol import family, layout, volumes
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.load import load
from drivebay.bdev.lvol.metadata import Metadata
from tests.fakes.lvol_disk import KIB, MemoryDisk, describe, fill, make_table, named, new_store

CLUSTER = 4 * KIB
PAGE = layout.PAGE
# What is written over a field of 1, 4 or 8 bytes.
VALUES = [0, 1, 2, 5, 0x7F, 0xFF, 0x1000, 0xFFFF, 1 << 20, 1 << 27, 1 << 31, (1 << 32) - 1]
EACH_PAGE = 20


async def _store() -> Metadata:
    metadata = await new_store(200 * CLUSTER, CLUSTER, block_size=4096, percent=20)
    volume = await volumes.create(metadata, "thin", UUID(int=10), 40 * CLUSTER, thin=True)
    await fill(metadata, volume, 3, 1)
    await volumes.snapshot(metadata, volume, "snapshot", UUID(int=11))
    await fill(metadata, volume, 4, 2)
    await volumes.create(metadata, "thick", UUID(int=12), 10 * CLUSTER)
    external = str(UUID(int=99)).encode() + b"\0"
    await volumes.create(metadata, "clone", UUID(int=13), 4 * CLUSTER, external=external)
    make = metadata.make_table
    metadata.make_table = lambda count, blob_id, _: make(count, blob_id, False)
    await volumes.create(metadata, "runs", UUID(int=14), 10 * CLUSTER)
    return metadata


@functools.cache
def images() -> tuple[bytes, bytes, tuple[int, ...]]:
    """A store that was not closed, the same closed, and the pages that it uses."""

    async def scene() -> tuple[bytes, bytes, tuple[int, ...]]:
        metadata = await _store()
        assert isinstance(metadata.device, MemoryDisk)
        dirty = bytes(metadata.device.content)
        await metadata.close()
        used = tuple(n for n, flag in enumerate(metadata.used_pages) if flag)
        return dirty, bytes(metadata.device.content), used

    return asyncio.run(scene())


def image_of(closed: bool) -> bytes:
    dirty, clean, _ = images()
    return clean if closed else dirty


def opened(image: bytes | bytearray) -> Metadata | str:
    """The store, or what is said instead; a refused disk was not written to."""
    disk = MemoryDisk(image, 4096)
    try:
        return asyncio.run(load(disk, make_table))
    except StoreError as error:
        said = str(error)
    assert not disk.log
    assert len(said) > 20
    return said


def sealed(image: bytearray, offset: int) -> bytearray:
    """With the right checksum for the page or super block at ``offset``."""
    page = memoryview(image)[offset : offset + PAGE]
    struct.pack_into("<I", page, PAGE - 4, layout.page_crc(page))
    return image


def damaged(image: bytes, page: int, offset: int, width: int, value: int) -> bytearray:
    changed = bytearray(image)
    changed[page + offset : page + offset + width] = (value % (1 << 8 * width)).to_bytes(
        width, "little"
    )
    return changed


@pytest.mark.parametrize("closed", [False, True])
def test_any_field_of_the_super_block(closed: bool) -> None:
    image = image_of(closed)
    metadata = opened(image)
    assert isinstance(metadata, Metadata)
    whole = describe(metadata)
    for offset in range(0, 96, 4):
        for value in VALUES[offset // 4 % 3 :: 3]:
            changed = damaged(image, 0, offset, 4, value)
            if changed == image:
                continue
            found = opened(changed)  # what a torn write explains is mended
            assert isinstance(found, str) or describe(found) == whole
            opened(sealed(changed, 0))


def test_a_super_block_without_its_rest() -> None:
    image = images()[1]
    for length in (0, 8, 100, 511, 4095):
        assert isinstance(opened(image[:length].ljust(4096, b"\0")), str)
    assert isinstance(opened(image[: len(image) // 2]), str)


@pytest.mark.parametrize("closed", [False, True])
def test_any_field_of_any_page(closed: bool) -> None:
    image, used = image_of(closed), images()[2]
    sb = layout.unpack_super(image[:PAGE], len(image), 4096)
    chosen = random.Random(closed)
    for number in used:
        page = sb.page_offset(number)
        length = len(image[page : page + PAGE - 8].rstrip(b"\0"))
        for _ in range(EACH_PAGE):
            offset = chosen.choice([chosen.randrange(length), PAGE - 8, 8, 0])
            width = chosen.choice([1, 4, 4, 8]) if offset < PAGE - 8 else 4
            opened(sealed(damaged(image, page, offset, width, chosen.choice(VALUES)), page))


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 300), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    ),
)
def test_any_bytes(closed: bool, changes: list[tuple[int, int, int]]) -> None:
    changed = bytearray(image_of(closed))
    for page, offset, value in changes:
        changed[page * PAGE + offset] = value
        if page not in (1, 2, 3):  # the masks have no checksum
            sealed(changed, page * PAGE)
    opened(changed)


def test_a_page_whose_checksum_is_wrong_is_never_used() -> None:
    _, image, used = images()
    sb = layout.unpack_super(image[:PAGE], len(image), 4096)
    for number in used:
        changed = damaged(image, sb.page_offset(number), 20, 1, 0x55)
        assert isinstance(opened(changed), str)


async def _with(change: str) -> bytearray:
    """A store in which something is wrong that no single field shows."""
    metadata = await _store()
    thin, snapshot = named(metadata, "thin"), named(metadata, "snapshot")
    thick, runs = named(metadata, "thick"), named(metadata, "runs")
    if change == "circle":
        snapshot.invalid_flags |= layout.THIN
        snapshot.set_reference(layout.SNAPSHOT_OF, thin.id)
        await metadata.persist(snapshot)
    elif change == "same name":
        thick.xattrs[b"name"] = b"thin\0"
        await metadata.persist(thick)
    elif change == "cluster twice":
        runs.table.clusters[2] = thick.table.clusters[2]
        await metadata.persist(runs)
    elif change == "metadata as data":
        runs.table.clusters[2] = 1
        await metadata.persist(runs)
    elif change == "no parent":
        thin.set_reference(layout.SNAPSHOT_OF, layout.ID_BIT | 39)
        await metadata.persist(thin)
    elif change == "page twice":
        pages = [blob.table.extent_pages for blob in (thin, thick)]
        assert pages[0] is not None
        assert pages[1] is not None
        pages[0][0] = pages[1][0]
        await metadata.persist(thin)
    elif change == "unknown feature":
        thick.invalid_flags |= 1 << 40
        await metadata.persist(thick)
    assert isinstance(metadata.device, MemoryDisk)
    return metadata.device.content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("circle", "clone of itself"),
        ("same name", "two volumes are called 'thin'"),
        ("cluster twice", "used twice"),
        ("metadata as data", "cluster 1 is used twice"),
        ("no parent", "clone of one that is not there"),
        ("page twice", "used twice"),
        ("unknown feature", "features that this program does not know"),
    ],
)
def test_what_no_single_field_shows(change: str, said: str) -> None:
    found = opened(asyncio.run(_with(change)))
    assert isinstance(found, str)
    assert said in found


@pytest.mark.parametrize(("flags", "reads_only"), [("data_ro_flags", True), ("md_ro_flags", False)])
def test_unknown_flags_are_obeyed(flags: str, reads_only: bool) -> None:
    async def scene() -> None:
        metadata = await _store()
        thick = named(metadata, "thick")
        setattr(thick, flags, 1 << 20)
        await metadata.persist(thick)
        disk = metadata.device
        assert isinstance(disk, MemoryDisk)
        metadata = await load(disk, make_table)
        thick = named(metadata, "thick")
        assert thick.data_read_only == reads_only
        before = bytes(disk.content)
        uuid = UUID(int=50)
        for change in (
            volumes.rename(metadata, thick, "new"),
            volumes.resize(metadata, thick, CLUSTER),
            volumes.snapshot(metadata, thick, "new", uuid),
            volumes.set_read_only(metadata, thick),
            family.delete(metadata, thick),
        ):
            with pytest.raises(StoreError):
                await change
        assert disk.content == before
        assert describe(metadata) == describe(await load(disk, make_table))

    asyncio.run(scene())
