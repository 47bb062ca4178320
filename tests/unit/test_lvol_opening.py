"""Stores with many volumes: what opening them leaves to the rest of the process."""

from __future__ import annotations

import asyncio
import gc
import weakref

from drivebay.bdev.lvol.lifelong import forgotten, lifelong
from drivebay.bdev.lvol.load import load
from tests.fakes.lvol_disk import MemoryDisk, fixture, make_table
from tests.unit.test_lvol_store import CLUSTER, Scene, played


class Thing:
    """Something that can be in a circle, and watched."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_made_for_long_is_not_walked_through_until_it_is_forgotten() -> None:
    with lifelong():
        assert not gc.isenabled()
        with lifelong():
            thing = Thing()
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not any(found is thing for found in gc.get_objects())
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is not None
    forgotten()
    gc.collect()
    assert gone() is None
    assert gc.get_freeze_count() == 0


def test_the_collector_works_while_a_disk_is_waited_for() -> None:
    class Watched(MemoryDisk):
        async def read(self, offset: int, length: int) -> bytes:
            working.append(gc.isenabled())
            return await super().read(offset, length)

    working: list[bool] = []
    asyncio.run(load(Watched(fixture("spdk-lvs-clean", 512).content), make_table))
    forgotten()
    assert len(working) > 2
    assert all(working)


@played
async def test_the_volumes_of_a_closed_store_are_given_back(scene: Scene) -> None:
    store = await scene.store()
    await store.create_volume("one", CLUSTER, thin=True)
    store = await scene.again()
    [volume] = store.volumes
    gone = weakref.ref(store)
    assert not any(found is volume for found in gc.get_objects())
    del store, volume
    await scene.stores.close()
    gc.collect()
    assert gone() is None
