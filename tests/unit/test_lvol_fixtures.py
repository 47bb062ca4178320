"""Stores that SPDK wrote open here with their content, one of them after a crash."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from drivebay.bdev.lvol import family, volumes
from drivebay.bdev.lvol.load import load
from drivebay.bdev.lvol.metadata import Metadata
from tests.fakes.lvol_disk import DATA, MemoryDisk, fixture, make_table, named, read_cluster

STORES = [("spdk-lvs-clean", 4096), ("spdk-lvs-crashed", 512)]


def digest(metadata: Metadata, name: str) -> str:
    blob = named(metadata, name)
    found = hashlib.sha256()
    for index in range(blob.table.num_clusters):
        found.update(read_cluster(metadata, blob, index) or b"")
    return found.hexdigest()


def facts(metadata: Metadata, name: str) -> dict[str, Any]:
    blob = named(metadata, name)
    return {
        "uuid": str(blob.uuid),
        "is_thin_provisioned": blob.thin,
        "is_snapshot": metadata.is_snapshot(blob),
        "is_clone": blob.parent_id is not None,
        "is_esnap_clone": blob.external_id is not None,
        "num_allocated_clusters": blob.table.allocated,
    }


@pytest.mark.parametrize(("name", "block_size"), STORES)
def test_a_store_of_spdk_opens_with_its_content(name: str, block_size: int) -> None:
    said = json.loads((DATA / f"{name}.json").read_text())
    disk = fixture(name, block_size)
    metadata = asyncio.run(load(disk, make_table))
    assert disk.writes == 0
    store = said["store"]
    assert (metadata.name, str(metadata.uuid)) == (store["name"], store["uuid"])
    assert metadata.total_data_clusters == store["total_data_clusters"]
    assert metadata.free.free == store["free_clusters"]
    assert metadata.sb.cluster_bytes == store["cluster_size"]
    assert metadata.sb.io_unit == store["block_size"]
    assert metadata.sb.max_growable == store["max_growable_size"]
    assert [blob.name for blob in metadata.volumes()] == [lvol["name"] for lvol in said["lvols"]]
    for lvol in said["lvols"]:
        found = facts(metadata, lvol["name"])
        assert found == {key: lvol[key] for key in found}, lvol["name"]
    for volume, content in said["content"].items():
        size = named(metadata, volume).table.num_clusters * metadata.sb.cluster_bytes
        assert size == content["bytes"]
        assert digest(metadata, volume) == content["sha256"], volume


async def change_everything(disk: MemoryDisk) -> dict[str, str]:
    metadata = await load(disk, make_table)
    before = {blob.name: digest(metadata, blob.name) for blob in metadata.volumes()}
    snap1, snap2 = named(metadata, "snap1"), named(metadata, "snap2")
    for snapshot in (snap1, snap2):
        if len(metadata.clones_of(snapshot)) == 1:
            metadata.release(await family.delete(metadata, snapshot))
            before.pop(snapshot.name)
            break
    await volumes.rename(metadata, named(metadata, "thin"), "thinner")
    before["thinner"] = before.pop("thin")
    await metadata.close()
    return before


@pytest.mark.parametrize(("name", "block_size"), STORES)
def test_it_is_writable_afterwards(name: str, block_size: int) -> None:
    disk = fixture(name, block_size)
    expected = asyncio.run(change_everything(disk))
    metadata = asyncio.run(load(disk, make_table))
    assert metadata.sb.clean == 1
    assert {blob.name: digest(metadata, blob.name) for blob in metadata.volumes()} == expected


@pytest.mark.parametrize("name", [name for name, _ in STORES])
def test_closing_writes_the_masks_that_spdk_would(name: str) -> None:
    """A clean store is closed again after a change and back: the same bytes as SPDK's.

    But for the end of the super block, where SPDK has nothing but the checksum.
    """
    disk = fixture(name, 512)
    original = bytes(disk.content)

    async def scene() -> None:
        metadata = await load(disk, make_table)
        await metadata.begin_change()
        await metadata.close()

    asyncio.run(scene())
    if name == "spdk-lvs-clean":
        assert disk.content[:3584] == original[:3584]
        assert disk.content[4096:] == original[4096:]
    else:
        assert asyncio.run(load(disk, make_table)).sb.clean == 1


@pytest.mark.parametrize("name", [name for name, _ in STORES])
def test_extent_pages_of_spdk_can_be_mended_once_the_store_is_open(name: str) -> None:
    """Until then a torn write could not be told from anything else; sealing changes one block."""
    disk = fixture(name, 512)

    async def scene() -> None:
        metadata = await load(disk, make_table)
        assert len(metadata.unsealed) == 4
        before = bytes(disk.content)
        await metadata.open()
        changed = [
            i for i in range(0, disk.size, 512) if disk.content[i : i + 512] != before[i : i + 512]
        ]
        assert {place % 4096 for place in changed} <= {0, 3584}
        assert {place // 4096 for place in changed if place % 4096 == 0} <= {0}
        assert not metadata.unsealed
        assert not (await load(disk, make_table)).unsealed

    asyncio.run(scene())
