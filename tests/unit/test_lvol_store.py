"""A store in a running target: bdevs, claims, data, changes under I/O, and its end."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest

from drivebay.bdev.base import Bdev
from drivebay.bdev.error import ErrorBdev
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.store import Store
from drivebay.bdev.lvol.stores import Stores
from drivebay.bdev.lvol.volume import Volume
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.errors import AlreadyExists, DrivebayError, InUse, NotFound
from drivebay.reactor.reactor import Reactor
from tests.fakes.threaded import running_reactor

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB


@dataclass
class Scene:
    registry: BdevRegistry
    reactor: Reactor
    stores: Stores
    base: Bdev

    async def store(self, **options: int) -> Store:
        return await self.stores.create(self.base, "lvs", cluster_bytes=CLUSTER, **options)

    async def write(self, volume: Volume, offset: int, data: bytes) -> None:
        assert volume.bdev is not None
        async with self.registry.access(volume.bdev, self.reactor) as access:
            await access.write(offset, data)

    async def read(self, volume: Volume, offset: int, length: int) -> bytes:
        assert volume.bdev is not None
        async with self.registry.access(volume.bdev, self.reactor) as access:
            return await access.read(offset, length)

    async def put_errors_on_the_base(self) -> ErrorBdev:
        """The base is now a bdev that can be told to fail."""
        self.base = errors = ErrorBdev("errors", uuid4(), self.base)
        self.registry.add(errors)
        await self.registry.examining.wait()
        return errors

    async def again(self) -> Store:
        """Close all stores, and find the one on the base again."""
        await self.stores.close()
        await self.stores.examine(self.base)
        return next(iter(self.stores))


@asynccontextmanager
async def open_scene(size: int = 8 * MIB) -> AsyncIterator[Scene]:
    registry = BdevRegistry()
    async with running_reactor() as reactor:
        stores = Stores(registry, lambda: reactor)
        registry.examining.on_arrival(stores.arrived)
        registry.examining.on_examine(stores.examine)
        base = MallocBdev("base", None, 512, size // 512)
        registry.add(base)
        await registry.examining.wait()
        try:
            yield Scene(registry, reactor, stores, base)
        finally:
            await stores.close()
            await registry.examining.wait()
            await registry.close()


def played(test: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
    """A test of one scene, in at most 30 seconds."""

    def run() -> None:
        async def limited() -> None:
            async with asyncio.timeout(30), open_scene() as scene:
                await test(scene)

        asyncio.run(limited())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def stripe(number: int, length: int = CLUSTER) -> bytes:
    return bytes([number]) * length


@played
async def test_a_store_claims_its_base_and_shows_its_volumes(scene: Scene) -> None:
    store = await scene.store()
    assert scene.registry.claims(scene.base).kind == "read_many_write_one"
    with pytest.raises(InUse) as caught:
        await scene.stores.create(scene.base, "other", cluster_bytes=CLUSTER)
    assert caught.value.errno == errno.EPERM
    volume = await store.create_volume("one", 100 * KIB)
    bdev = scene.registry.get("lvs/one")
    assert volume.bdev is bdev
    assert (bdev.name, bdev.product_name) == (str(volume.uuid), "Logical Volume")
    assert bdev.num_blocks * bdev.block_size == 2 * CLUSTER
    assert bdev.driver_specific()["lvol"] == {
        "lvol_store_uuid": str(store.uuid),
        "base_bdev": "base",
        "thin_provision": False,
        "num_allocated_clusters": 2,
        "snapshot": False,
        "clone": False,
        "esnap_clone": False,
    }
    assert scene.stores.volume("lvs/one") is scene.stores.volume(str(volume.uuid)) is volume
    with pytest.raises(NotFound):
        scene.stores.volume("base")
    await scene.stores.destroy(store)
    assert scene.registry.claims(scene.base).kind is None
    assert [b.name for b in scene.registry] == ["base"]
    await scene.stores.examine(scene.base)
    assert not list(scene.stores)


@played
async def test_what_was_written_is_there_after_a_new_start(scene: Scene) -> None:
    store = await scene.store()
    thick = await store.create_volume("thick", 2 * CLUSTER)
    thin = await store.create_volume("thin", 50 * CLUSTER, thin=True)
    await scene.write(thick, CLUSTER - 512, stripe(1, 1024))
    await scene.write(thin, 40 * CLUSTER, stripe(2))
    assert thin.allocated == 1
    free = store.free_clusters
    store = await scene.again()
    assert store.metadata.sb.clean == 0
    assert store.free_clusters == free
    thick, thin = store.volumes
    assert await scene.read(thick, CLUSTER - 512, 1024) == stripe(1, 1024)
    assert await scene.read(thin, 39 * CLUSTER, 3 * CLUSTER) == (
        bytes(CLUSTER) + stripe(2) + bytes(CLUSTER)
    )


@played
async def test_snapshots_and_clones_keep_what_they_saw(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 4 * CLUSTER, thin=True)
    await scene.write(volume, 0, stripe(1, 2 * CLUSTER))
    lower = await store.snapshot(volume, "lower")
    await scene.write(volume, CLUSTER, stripe(2))
    upper = await store.snapshot(volume, "upper")
    await scene.write(volume, 2 * CLUSTER, stripe(3))
    clone = await store.clone(lower, "clone")
    await scene.write(clone, 0, stripe(4, 512))
    seen = {
        "lower": stripe(1, 2 * CLUSTER) + bytes(2 * CLUSTER),
        "upper": stripe(1) + stripe(2) + bytes(2 * CLUSTER),
        "v": stripe(1) + stripe(2) + stripe(3) + bytes(CLUSTER),
        "clone": stripe(4, 512) + stripe(1, 2 * CLUSTER - 512) + bytes(2 * CLUSTER),
    }
    for _ in range(2):
        for found in store.volumes:
            assert await scene.read(found, 0, 4 * CLUSTER) == seen[found.name], found.name
        store = await scene.again()
    with pytest.raises(DrivebayError):
        await scene.write(scene.stores.volume("lvs/upper"), 0, stripe(9))
    with pytest.raises(StoreError) as caught:
        await store.delete(scene.stores.volume("lvs/lower"))
    assert caught.value.errno == errno.EPERM
    await store.delete(scene.stores.volume("lvs/upper"))
    await store.delete(scene.stores.volume("lvs/clone"))
    await store.delete(scene.stores.volume("lvs/lower"))
    [volume] = store.volumes
    assert await scene.read(volume, 0, 4 * CLUSTER) == seen["v"]
    assert (volume.allocated, volume.is_clone) == (3, False)
    assert store.free_clusters == store.total_data_clusters - 3
    assert upper.bdev is None


@played
async def test_inflated_and_decoupled_volumes_read_the_same(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 20 * CLUSTER, thin=True)
    await scene.write(volume, 0, stripe(1))
    snapshot = await store.snapshot(volume, "s")
    clone = await store.clone(snapshot, "c")
    await scene.write(clone, CLUSTER, stripe(2))
    await store.decouple(volume)
    assert (volume.allocated, volume.is_clone, volume.is_thin) == (1, False, True)
    with pytest.raises(StoreError) as caught:
        await store.decouple(volume)
    assert caught.value.errno == errno.EINVAL
    await store.inflate(clone)
    assert (clone.allocated, clone.is_clone, clone.is_thin) == (20, False, False)
    await store.delete(snapshot)
    assert await scene.read(volume, 0, 2 * CLUSTER) == stripe(1) + bytes(CLUSTER)
    assert await scene.read(clone, 0, 3 * CLUSTER) == stripe(1) + stripe(2) + bytes(CLUSTER)
    await store.inflate(clone)


@played
async def test_sizes_change_and_the_users_hear_of_it(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 3 * CLUSTER)
    await scene.write(volume, 2 * CLUSTER, stripe(1))
    bdev = volume.bdev
    assert bdev is not None
    await store.resize(volume, 5 * CLUSTER)
    assert bdev.num_blocks * 512 == 5 * CLUSTER
    assert await scene.read(volume, 2 * CLUSTER, CLUSTER) == stripe(1)
    async with scene.registry.access(bdev, scene.reactor):
        with pytest.raises(InUse) as caught:
            await store.resize(volume, CLUSTER)
        assert caught.value.errno == errno.EBUSY
    free = store.free_clusters
    await store.resize(volume, CLUSTER)
    assert (bdev.num_blocks * 512, store.free_clusters) == (CLUSTER, free + 4)
    with pytest.raises(StoreError) as full:
        await store.resize(volume, 1 << 40)
    assert full.value.errno == errno.ENOSPC
    await store.resize(volume, 3 * CLUSTER)
    assert await scene.read(volume, CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)


@played
async def test_names_change_everywhere(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", CLUSTER)
    other = await store.create_volume("w", CLUSTER)
    await store.rename(volume, "new")
    assert scene.registry.get("lvs/new") is volume.bdev
    with pytest.raises(NotFound):
        scene.registry.get("lvs/v")
    with pytest.raises(AlreadyExists):
        await store.rename(other, "new")
    await scene.stores.rename(store, "store")
    assert scene.registry.get("store/new") is volume.bdev
    assert scene.stores.find(name="lvs") is None
    store = await scene.again()
    assert [(store.name, v.name) for v in store.volumes] == [("store", "new"), ("store", "w")]


@played
async def test_first_writes_fail_with_their_metadata_and_no_longer(scene: Scene) -> None:
    """Whatever write of the metadata it is that fails; what was answered is there after a load."""
    errors = await scene.put_errors_on_the_base()
    store = await scene.store()
    volume = await store.create_volume("v", 600 * 64 * KIB, thin=True)
    expected, free = bytearray(4 * CLUSTER), store.free_clusters
    for count in range(1, 5):
        offset = (count - 1) * CLUSTER
        errors.inject("write", "failure", count)
        failed = 0
        for attempt in range(9):
            try:
                await scene.write(volume, offset, stripe(attempt, 512))
            except DrivebayError:
                failed += 1
                assert store.metadata.failure is None
            else:
                expected[offset : offset + 512] = stripe(attempt, 512)
                break
        assert 0 < failed <= count
        assert errors.left("write") == 0
        assert store.free_clusters == free - count
    errors.inject("write", "failure", 2)
    with pytest.raises(DrivebayError):
        await scene.write(volume, 5 * CLUSTER, stripe(1, 512))
    with pytest.raises(DrivebayError):
        await store.create_volume("w", CLUSTER)
    await store.create_volume("w", CLUSTER)
    assert store.free_clusters == free - 5
    store = await scene.again()
    assert store.free_clusters == free - 5
    assert await scene.read(store.volumes[0], 0, 4 * CLUSTER) == expected


@played
async def test_after_a_failed_change_no_first_write_is_answered(scene: Scene) -> None:
    """A cluster whose way on the disk is not known could be lost."""
    errors = await scene.put_errors_on_the_base()
    store = await scene.store()
    volume = await store.create_volume("v", 4 * CLUSTER, thin=True)
    await scene.write(volume, 0, stripe(1))
    errors.inject("write", "failure")
    with pytest.raises(DrivebayError):
        await store.snapshot(volume, "s")
    await scene.write(volume, 0, stripe(2))
    for _ in range(2):
        with pytest.raises(DrivebayError):
            await scene.write(volume, CLUSTER, stripe(3))
        with pytest.raises(StoreError, match="takes no changes"):
            await store.create_volume("w", CLUSTER)
    store = await scene.again()
    assert await scene.read(store.volumes[0], 0, 2 * CLUSTER) == stripe(2) + bytes(CLUSTER)


@played
async def test_a_clone_of_another_bdev(scene: Scene) -> None:
    image = MallocBdev("image", UUID(int=5), 512, 4 * CLUSTER // 512)
    scene.registry.add(image)
    await scene.registry.examining.wait()
    async with scene.registry.access(image, scene.reactor) as access:
        await access.write(CLUSTER, stripe(7))
    store = await scene.store()
    clone = await store.clone_bdev(image, "c")
    assert scene.registry.claims(image).kind == "read_many_write_none"
    await scene.write(clone, CLUSTER, stripe(8, 512))
    seen = bytes(CLUSTER) + stripe(8, 512) + stripe(7, CLUSTER - 512) + bytes(2 * CLUSTER)
    assert await scene.read(clone, 0, 4 * CLUSTER) == seen
    snapshot = await store.snapshot(clone, "s")
    assert (snapshot.is_esnap_clone, clone.is_esnap_clone, clone.is_clone) == (True, False, True)
    assert await scene.read(clone, 0, 4 * CLUSTER) == seen
    await scene.registry.remove("image")
    assert clone.is_degraded
    assert snapshot.is_degraded
    assert scene.stores.volume("lvs/c") is clone
    image = MallocBdev("image", UUID(int=5), 512, 4 * CLUSTER // 512)
    scene.registry.add(image)
    await scene.registry.wait_for(str(clone.uuid), 10)
    assert not clone.is_degraded
    assert (await scene.read(clone, CLUSTER, 512)) == stripe(8, 512)
    await store.inflate(clone)
    await store.delete(snapshot)
    assert scene.registry.claims(image).kind is None
    assert (await scene.read(clone, CLUSTER, 512)) == stripe(8, 512)


@played
async def test_extent_pages_come_some_at_once_while_there_are_many(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 10 * 512 * CLUSTER, thin=True)
    pages = volume.table.extent_pages
    assert pages is not None
    await scene.write(volume, 0, stripe(1, 512))
    assert [bool(page) for page in pages] == [True] * 8 + [False] * 2
    flushes = store.metadata.flushes
    await scene.write(volume, 512 * CLUSTER, stripe(1, 512))
    assert store.metadata.flushes == flushes  # control was not asked
    await scene.write(volume, 9 * 512 * CLUSTER, stripe(1, 512))
    assert [bool(page) for page in pages] == [True] * 8 + [False, True]
    await scene.stores.destroy(store)
    store = await scene.store(pages_percent=20)
    volume = await store.create_volume("v", 10 * 512 * CLUSTER, thin=True)
    pages = volume.table.extent_pages
    assert pages is not None
    await scene.write(volume, 0, stripe(1, 512))
    assert [bool(page) for page in pages] == [True] + [False] * 9


@played
async def test_a_store_that_does_not_start_holds_nothing(scene: Scene) -> None:
    """Wherever it is cancelled, and when the disk fails."""
    image = MallocBdev("image", UUID(int=5), 512, 4 * CLUSTER // 512)
    scene.registry.add(image)
    errors = await scene.put_errors_on_the_base()
    store = await scene.store()
    await store.clone_bdev(image, "c")
    moments: list[Callable[[], object]] = [
        lambda: scene.registry.claims(image).kind,
        lambda: scene.registry.channels(image),
        lambda: next(iter(scene.stores)).volumes[0].bdev,
    ]
    for moment in moments:
        await scene.stores.close()
        opening = asyncio.create_task(scene.stores.load(scene.base))
        while not (list(scene.stores) and moment()):
            assert not opening.done()
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert [bdev.name for bdev in scene.registry] == ["base", "image", "errors"]
        assert scene.registry.claims(scene.base).kind is None
        assert scene.registry.claims(image).kind is None
    await scene.stores.close()
    errors.inject("write", "failure")
    with pytest.raises(DrivebayError):
        await scene.stores.load(scene.base)
    assert scene.registry.claims(scene.base).kind is None
    await scene.stores.load(scene.base)
    assert scene.registry.get("lvs/c").module == "lvol"


@played
async def test_set_parent(scene: Scene) -> None:
    image = MallocBdev("image", UUID(int=5), 512, 4 * CLUSTER // 512)
    scene.registry.add(image)
    await scene.registry.examining.wait()
    async with scene.registry.access(image, scene.reactor) as access:
        await access.write(0, stripe(7))
    store = await scene.store()
    volume = await store.create_volume("v", 4 * CLUSTER, thin=True)
    await scene.write(volume, 0, stripe(1))
    snapshot = await store.snapshot(volume, "s")
    other = await store.create_volume("o", 4 * CLUSTER, thin=True)
    await store.set_parent(other, snapshot)
    assert await scene.read(other, 0, CLUSTER) == stripe(1)
    with pytest.raises(StoreError) as caught:
        await store.set_parent(other, snapshot)
    assert caught.value.errno == errno.EEXIST
    await store.set_parent_bdev(other, image)
    assert await scene.read(other, 0, CLUSTER) == stripe(7)
    await store.set_parent(other, snapshot)
    assert await scene.read(other, 0, CLUSTER) == stripe(1)
    assert scene.registry.claims(image).kind is None


@played
async def test_the_base_goes_and_comes_back(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", CLUSTER)
    await scene.write(volume, 0, stripe(1))
    async with scene.registry.access(scene.base, scene.reactor) as access:
        content = await access.read(0, 8 * MIB)
    await scene.registry.remove("base")
    assert not list(scene.registry)
    assert not list(scene.stores)
    scene.base = MallocBdev("base2", None, 512, 8 * MIB // 512)
    scene.registry.add(scene.base)
    await scene.registry.examining.wait()
    async with scene.registry.access(scene.base, scene.reactor) as access:
        await access.write(0, content)
    await scene.stores.examine(scene.base)
    await scene.registry.wait_for("lvs/v", 10)
    assert await scene.read(scene.stores.volume("lvs/v"), 0, CLUSTER) == stripe(1)


@played
async def test_many_first_writes_while_snapshots_are_made(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 60 * CLUSTER, thin=True)
    assert volume.bdev is not None
    async with scene.registry.access(volume.bdev, scene.reactor) as access:
        writes = [
            asyncio.create_task(access.write(index * CLUSTER, stripe(index + 1, 512)))
            for index in range(60)
        ]
        await store.snapshot(volume, "s0")
        await asyncio.gather(*writes)
        await store.snapshot(volume, "s1")
        for index in range(60):
            assert await access.read(index * CLUSTER, 512) == stripe(index + 1, 512)
    store = await scene.again()
    volume = scene.stores.volume("lvs/v")
    for index in range(60):
        assert await scene.read(volume, index * CLUSTER, 512) == stripe(index + 1, 512)


@played
async def test_a_full_store_fails_writes_and_loses_nothing(scene: Scene) -> None:
    store = await scene.store()
    volume = await store.create_volume("v", 200 * CLUSTER, thin=True)
    count = store.free_clusters
    for index in range(count):
        await scene.write(volume, index * CLUSTER, stripe(index % 255 + 1, 512))
    with pytest.raises(DrivebayError) as caught:
        await scene.write(volume, count * CLUSTER, stripe(1, 512))
    assert caught.value.errno == errno.ENOSPC
    for index in range(count):
        assert await scene.read(volume, index * CLUSTER, 512) == stripe(index % 255 + 1, 512)
    with pytest.raises(StoreError) as thick:
        await store.create_volume("t", CLUSTER)
    assert thick.value.errno == errno.ENOSPC


@played
async def test_two_stores_of_one_name_do_not_meet(scene: Scene) -> None:
    await scene.store()
    second = MallocBdev("second", None, 512, 8 * MIB // 512)
    scene.registry.add(second)
    with pytest.raises(AlreadyExists):
        await scene.stores.create(second, "lvs", cluster_bytes=CLUSTER)
    assert scene.registry.claims(second).kind is None
