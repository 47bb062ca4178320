"""A power cut at any moment of any change leaves the old or the new state of a store."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID

import pytest

from drivebay.bdev.lvol import family, volumes
from drivebay.bdev.lvol.layout import StoreError
from drivebay.bdev.lvol.load import load
from drivebay.bdev.lvol.metadata import Metadata
from drivebay.errors import HostError
from tests.fakes.lvol_disk import (
    KIB,
    MemoryDisk,
    bury,
    describe,
    fill,
    make_table,
    named,
    new_store,
)

SUBSETS = 12  # of the writes that no flush has made stable, at most


def epochs(log: list[tuple[str, int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """The writes between flushes."""
    found: list[list[tuple[int, bytes]]] = [[]]
    for kind, offset, data in log:
        if kind == "flush":
            found.append([])
        else:
            found[-1].append((offset, data))
    return found


def after_a_cut(
    base: bytes, log: list[tuple[str, int, bytes]], block_size: int
) -> Iterator[bytearray]:
    """What a power cut can leave: all that was flushed, and any part of what was not."""
    stable = bytearray(base)
    chosen = random.Random(1)
    for writes in epochs(log):
        subsets = list(itertools.product((0, 1), repeat=len(writes))) if len(writes) < 4 else []
        subsets = subsets or [tuple(chosen.getrandbits(1) for _ in writes) for _ in range(SUBSETS)]
        for subset in subsets:
            image = bytearray(stable)
            for (offset, data), taken in zip(writes, subset, strict=True):
                if taken:
                    image[offset : offset + len(data)] = data
            yield image
        for offset, data in writes:
            stable[offset : offset + len(data)] = data
    yield stable


CLUSTER = 4 * KIB


async def small_store(block_size: int = 4096) -> Metadata:
    """Two thick volumes, a thin one with two snapshots, a clone; 1,024 clusters: two pages each."""
    metadata = await new_store(1250 * CLUSTER, CLUSTER, block_size=block_size, percent=5)
    thin = await volumes.create(metadata, "thin", UUID(int=10), 530 * CLUSTER, thin=True)
    for index, tag in ((0, 1), (1, 2), (520, 3)):
        await fill(metadata, thin, index, tag)
    lower = await volumes.snapshot(metadata, thin, "lower", UUID(int=11))
    await fill(metadata, thin, 1, 4)
    upper = await volumes.snapshot(metadata, thin, "upper", UUID(int=12))
    await fill(metadata, thin, 2, 5)
    await volumes.clone(metadata, lower, "other", UUID(int=13))
    await fill(metadata, named(metadata, "other"), 0, 6)
    thick = await volumes.create(metadata, "thick", UUID(int=14), 4 * CLUSTER)
    await fill(metadata, thick, 3, 7)
    assert upper.table.allocated == 1
    await metadata.close()
    return metadata


Change = Callable[[Metadata], Awaitable[Any]]


def deletes(name: str) -> Change:
    async def change(metadata: Metadata) -> None:
        await bury(metadata, await family.delete(metadata, named(metadata, name)))

    return change


def resizes(name: str, clusters: int) -> Change:
    async def change(metadata: Metadata) -> None:
        blob = named(metadata, name)
        await bury(metadata, await volumes.resize(metadata, blob, clusters * CLUSTER))

    return change


async def decouples(metadata: Metadata) -> None:
    blob = named(metadata, "thin")
    for index in family.lacking(metadata, blob, everything=False):
        await fill(metadata, blob, index, 4)
    await family.decoupled(metadata, blob)


async def grows(metadata: Metadata) -> None:
    disk = metadata.device
    assert isinstance(disk, MemoryDisk)
    assert await metadata.grow()


CHANGES: dict[str, Change] = {
    "create thin": lambda m: volumes.create(m, "n", UUID(int=20), 600 * CLUSTER, thin=True),
    "create thick": lambda m: volumes.create(m, "n", UUID(int=20), 8 * CLUSTER),
    "create a clone of a bdev": lambda m: volumes.create(
        m, "n", UUID(int=20), 8 * CLUSTER, external=b"x" * 36 + b"\0"
    ),
    "snapshot a thin one": lambda m: volumes.snapshot(m, named(m, "thin"), "n", UUID(int=20)),
    "snapshot a thick one": lambda m: volumes.snapshot(m, named(m, "thick"), "n", UUID(int=20)),
    "clone": lambda m: volumes.clone(m, named(m, "upper"), "n", UUID(int=20)),
    "rename": lambda m: volumes.rename(m, named(m, "thin"), "n"),
    "rename the store": lambda m: volumes.rename_store(m, "n"),
    "set read-only": lambda m: volumes.set_read_only(m, named(m, "thick")),
    "grow a thick one": resizes("thick", 20),
    "grow a thin one": resizes("thin", 1030),
    "shrink a thick one": resizes("thick", 2),
    "shrink a thin one": resizes("thin", 515),
    "shrink to nothing": resizes("thick", 0),
    "delete a thick one": deletes("thick"),
    "delete a clone": deletes("other"),
    "delete a snapshot": deletes("upper"),
    "set parent": lambda m: family.set_parent(m, named(m, "other"), named(m, "upper")),
    "set parent to a bdev": lambda m: family.set_external_parent(
        m, named(m, "other"), b"y" * 36 + b"\0", 8 * CLUSTER
    ),
    "first write": lambda m: fill(m, named(m, "other"), 525, 8),
    "decouple": decouples,
    "close": lambda m: m.begin_change(),
}


async def states_of_cuts(
    base: bytes, log: list[tuple[str, int, bytes]], *, again: bool
) -> list[dict[str, Any]]:
    found = []
    for image in after_a_cut(base, log, 4096):
        disk = MemoryDisk(image, 4096)
        metadata = await load(disk, make_table)
        found.append(describe(metadata))
        if again and disk.log:  # and another cut while the first one's damage was repaired
            found += await states_of_cuts(bytes(image), disk.log, again=False)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_cut_leaves_the_old_or_the_new_state(name: str) -> None:
    async def scene() -> None:
        prepared = await small_store()
        disk = prepared.device
        assert isinstance(disk, MemoryDisk)
        base = bytes(disk.content)
        disk.log.clear()
        metadata = await load(disk, make_table)
        before = describe(metadata)
        assert not disk.log
        await CHANGES[name](metadata)
        await metadata.close()
        after = describe(await load(MemoryDisk(disk.content, 4096), make_table))
        assert after == describe(metadata)
        states = await states_of_cuts(base, disk.log, again=True)
        middle = [state for state in states if state not in (before, after)]
        if name in {"decouple", "first write"}:  # several changes, one after the other
            assert all(is_between(state, before, after) for state in middle)
        else:
            assert not middle
        assert before in states
        assert after in states

    asyncio.run(scene())


def torn_images(base: bytes, log: list[tuple[str, int, bytes]]) -> Iterator[bytearray]:
    """A cut in the middle of each write of a page: some of its blocks are old, some are new."""
    chosen = random.Random(2)
    content = bytearray(base)
    for kind, offset, data in log:
        if kind == "flush":
            continue
        for _ in range(4 if len(data) == 4096 else 0):
            image = bytearray(content)
            for block in range(0, 4096, 512):
                if chosen.getrandbits(1):
                    image[offset + block : offset + block + 512] = data[block : block + 512]
            yield image
        content[offset : offset + len(data)] = data


async def check_torn(base: bytes, change: Change, *, several: bool = False) -> None:
    disk = MemoryDisk(base, 512)
    metadata = await load(disk, make_table)
    await metadata.open()
    before = describe(metadata)
    await change(metadata)
    await metadata.close()
    after = describe(metadata)
    for image in torn_images(base, disk.log):
        found = MemoryDisk(image, 512)
        metadata = await load(found, make_table)
        state = describe(metadata)
        assert state in (before, after) or (several and is_between(state, before, after))
        mended = list(found.log)
        await metadata.open()
        await metadata.close()
        assert describe(await load(found, make_table)) == state
        for again in torn_images(bytes(image), mended):  # the mending itself is torn
            assert describe(await load(MemoryDisk(again, 512), make_table)) == state


@pytest.mark.parametrize("name", CHANGES)
def test_a_torn_page_is_mended(name: str) -> None:
    async def scene() -> None:
        prepared = await small_store(512)
        assert isinstance(prepared.device, MemoryDisk)
        several = name in {"decouple", "first write"}
        await check_torn(bytes(prepared.device.content), CHANGES[name], several=several)

    asyncio.run(scene())


def test_a_torn_page_that_changed_hands_is_mended() -> None:
    """Only its first write by the new owner says whose it is."""

    async def scene() -> None:
        metadata = await small_store(512)
        blob = await volumes.create(metadata, "a", UUID(int=20), 8 * CLUSTER, thin=True)
        await fill(metadata, blob, 0, 1)
        snapshot = await volumes.snapshot(metadata, blob, "s", UUID(int=21))
        clone = await volumes.clone(metadata, snapshot, "c", UUID(int=22))
        for gone in (blob, snapshot):
            await bury(metadata, await family.delete(metadata, gone))
        assert clone.table.extent_pages is not None
        assert clone.table.extent_pages[0]
        await metadata.close()
        assert isinstance(metadata.device, MemoryDisk)
        base = bytes(metadata.device.content)
        await check_torn(base, lambda m: fill(m, named(m, "c"), 1, 2), several=True)

    asyncio.run(scene())


def test_a_torn_super_block_of_a_growing_store_is_mended() -> None:
    async def scene() -> None:
        prepared = await small_store(512)
        assert isinstance(prepared.device, MemoryDisk)
        await check_torn(bytes(prepared.device.content) + bytes(300 * CLUSTER), grows)

    asyncio.run(scene())


def is_between(state: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Each volume reads as before or as after."""
    return all(value in (before[name], after[name]) for name, value in state.items())


def test_a_cut_while_the_store_grows() -> None:
    async def scene() -> None:
        prepared = await small_store()
        disk = prepared.device
        assert isinstance(disk, MemoryDisk)
        disk.content += bytes(300 * CLUSTER)
        base = bytes(disk.content)
        disk.log.clear()
        metadata = await load(disk, make_table)
        before = describe(metadata)
        free = metadata.free.free
        assert await metadata.grow()
        assert metadata.free.free == free + 300
        assert not await metadata.grow()
        after = describe(metadata)
        states = await states_of_cuts(base, disk.log, again=True)
        assert {len(disk.log) > 0, before in states, after in states} == {True}
        assert all(state in (before, after) for state in states)

    asyncio.run(scene())


def test_a_failed_write_stops_all_changes_and_a_new_load_has_a_whole_state() -> None:
    async def scene(fail_after: int) -> bool:
        prepared = await small_store()
        disk = prepared.device
        assert isinstance(disk, MemoryDisk)
        metadata = await load(disk, make_table)
        before = describe(metadata)
        disk.fail_after = fail_after
        try:
            await volumes.snapshot(metadata, named(metadata, "thin"), "n", UUID(int=20))
        except HostError:
            disk.fail_after = None
        else:
            return False
        for name in ("thick", "thin"):
            with pytest.raises(StoreError, match="takes no changes"):
                await volumes.rename(metadata, named(metadata, name), "other name")
        state = describe(await load(disk, make_table))
        state.pop("n", None)
        assert state.keys() == before.keys()
        return True

    failed = 0
    while asyncio.run(scene(failed)):
        failed += 1
    assert failed > 3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("run_lengths", "which"), [(False, 0), (False, 1), (True, 1)])
def test_what_a_first_write_needs_fails_is_repeated_and_costs_nothing(
    run_lengths: bool, which: int, late: bool
) -> None:
    """A new extent page, the root that names it, a chain of run lengths; on the disk or not."""

    async def scene() -> None:
        metadata = await small_store()
        disk = metadata.device
        assert isinstance(disk, MemoryDisk)
        if run_lengths:
            make = metadata.make_table
            metadata.make_table = lambda count, blob_id, _: make(count, blob_id, False)
        blob = await volumes.create(metadata, "n", UUID(int=20), 600 * CLUSTER, thin=True)
        pages, free = metadata.free_page_count(), metadata.free.free
        before = describe(metadata)
        disk.fail_after, disk.fails_late = which, late
        with pytest.raises(HostError):
            await fill(metadata, blob, 5, 1)
        if not metadata.is_known:
            disk.fail_after = 0
            with pytest.raises(HostError):
                await fill(metadata, blob, 6, 2)
        disk.fail_after = None
        state = describe(await load(MemoryDisk(disk.content, 4096), make_table))
        for name, value in state.items():
            assert value[:-1] == before[name][:-1]
            assert value == before[name] or (late and value[-1][5] == 1)  # still nobody else's
        assert metadata.failure is None
        await metadata.begin_change()
        assert metadata.is_known
        assert (metadata.free_page_count(), metadata.free.free) == (pages, free)
        assert describe(await load(MemoryDisk(disk.content, 4096), make_table)) == before
        await fill(metadata, blob, 5, 3)
        after = describe(metadata)
        await metadata.close()
        loaded = await load(disk, make_table)
        assert describe(loaded) == after != before
        assert loaded.free.free == metadata.free.free == free - 1
        assert loaded.free_page_count() == metadata.free_page_count()

    asyncio.run(scene())


def test_a_snapshot_of_a_clone_of_a_bdev_leaves_it_to_its_own_clone() -> None:
    async def scene() -> None:
        metadata = await small_store()
        external = b"x" * 36 + b"\0"
        blob = await volumes.create(metadata, "n", UUID(int=20), 8 * CLUSTER, external=external)
        before = describe(metadata)
        snapshot = await volumes.snapshot(metadata, blob, "s", UUID(int=21))
        assert (blob.external_id, snapshot.external_id) == (None, external)
        await bury(metadata, await family.delete(metadata, snapshot))
        assert describe(metadata) == before
        assert describe(await load(metadata.device, make_table)) == before

    asyncio.run(scene())
