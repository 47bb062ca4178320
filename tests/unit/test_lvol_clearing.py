"""Free clusters of a store that was loaded: cleared before somebody gets them, some ahead."""

from __future__ import annotations

import asyncio

from drivebay.bdev.lvol.store import Store
from drivebay.errors import DrivebayError
from tests.unit.test_lvol_store import CLUSTER, Scene, played, stripe


async def settled(scene: Scene, store: Store) -> None:
    """Control has done what first writes asked it for."""
    async with store._metadata:
        pass
    await asyncio.sleep(0.05)
    async with store._metadata:
        pass


@played
async def test_a_loaded_store_clears_the_clusters_that_come_next_together(scene: Scene) -> None:
    """They hold what was there before; who writes a little of one shows nothing of that."""
    store = await scene.store()
    volume = await store.create_volume("old", 90 * CLUSTER)
    await scene.write(volume, 0, stripe(7, 90 * CLUSTER))
    await store.delete(volume)
    async with scene.registry.access(scene.base, scene.reactor) as access:
        await access.write(20 * CLUSTER, stripe(8, 80 * CLUSTER))  # as where unmap does nothing
    store = await scene.again()
    volume = await store.create_volume("v", 60 * CLUSTER, thin=True)
    scene.base.reset_iostat()
    expected = bytearray(60 * CLUSTER)
    for number in range(40):
        offset = number * CLUSTER + 512 * (number % 9)
        await scene.write(volume, offset, stripe(number + 1, 512))
        expected[offset : offset + 512] = stripe(number + 1, 512)
        if number == 0:
            await settled(scene, store)
    assert await scene.read(volume, 0, 60 * CLUSTER) == expected
    assert scene.base.iostat()["write_zeroes"].ops == 2  # the first one's own, and all others


@played
async def test_where_clearing_ahead_fails_each_cluster_is_cleared(scene: Scene) -> None:
    await scene.put_errors_on_the_base()
    await scene.store()
    async with scene.registry.access(scene.base, scene.reactor) as access:
        await access.write(20 * CLUSTER, stripe(8, 80 * CLUSTER))
    store = await scene.again()
    failing = store.metadata.device
    cleared: list[int] = []

    async def refuse(offset: int, length: int, *, may_unmap: bool = False) -> None:
        cleared.append(length)
        raise DrivebayError("this disk can't")

    failing.write_zeroes = refuse  # type: ignore[method-assign]
    volume = await store.create_volume("v", 60 * CLUSTER, thin=True)
    for number in range(40):
        await scene.write(volume, number * CLUSTER, stripe(number + 1, 512))
        if number == 0:
            await settled(scene, store)
    for number in range(40):
        assert await scene.read(volume, number * CLUSTER, CLUSTER) == (
            stripe(number + 1, 512) + bytes(CLUSTER - 512)
        )
    assert len(cleared) == 1
