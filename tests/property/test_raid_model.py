"""RAIDs against a bytearray: any geometry, any requests, members that come and go meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.bdev.base import Bdev
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.raid.geometry import data_sizes, num_blocks
from drivebay.bdev.raid.striped import StripedBdev
from tests.fakes.driver import Framing
from tests.fakes.raid import RaidScene, disk_of, play
from tests.fakes.stepped import Machine

COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SECTOR = 512

steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "zero", "discard", "flush"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 200),
        st.lists(st.integers(1, 40), max_size=3),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=12,
)


class NoRaid:
    """What a StripedBdev asks of its RAID; nothing here asks it."""

    def describe(self) -> dict[str, Any]:
        return {}

    def size_on_bases(self) -> int:
        return 0

    def trouble(self) -> None:
        raise AssertionError("a striped RAID has no trouble")


@settings(COMMON, max_examples=60)
@given(
    level=st.sampled_from(["raid0", "concat"]),
    sizes=st.lists(st.integers(16, 100), min_size=1, max_size=5),
    strip=st.sampled_from([1, 2, 8, 16]),
    offset=st.integers(0, 8),
    steps=steps,
)
def test_what_is_spread_over_bases_is_one_disk(
    level: str, sizes: list[int], strip: int, offset: int, steps: list[Any]
) -> None:
    bases: list[Bdev] = [
        MallocBdev(f"M{n}", None, SECTOR, size + offset) for n, size in enumerate(sizes)
    ]
    used = data_sizes(level, strip, sizes)
    offsets = [offset] * len(bases)
    disk = StripedBdev("R", None, bases, offsets, used, strip * SECTOR, level, NoRaid())
    model = bytearray(num_blocks(level, used) * SECTOR)
    assert disk.num_blocks * SECTOR == len(model)
    with Machine(disk) as machine:
        driver = machine.add_queue(64)
        for what, where, count, cuts, fill in steps:
            sector = int(where * disk.num_blocks)
            count = min(count, disk.num_blocks - sector)
            start, length = sector * SECTOR, count * SECTOR
            framing = Framing(tuple(cut * SECTOR for cut in cuts))
            if what == "write":
                data = bytes((fill + n // SECTOR) % 256 for n in range(length))
                driver.write(sector, data, framing)
                model[start : start + length] = data
            elif what == "zero":
                driver.write_zeroes(sector, count)
                model[start : start + length] = bytes(length)
            elif what == "discard":
                driver.discard(sector, count)
                model[start : start + length] = bytes(length)  # what malloc makes of it
            elif what == "flush":
                driver.flush()
            else:
                assert driver.read(sector, length, framing) == model[start : start + length]
        whole = b"".join(
            driver.read(sector, min(128, disk.num_blocks - sector) * SECTOR)
            for sector in range(0, disk.num_blocks, 128)
        )
        assert whole == model


actions = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["write", "zero", "read"]),
            st.integers(0, 255),
            st.integers(1, 64),
            st.integers(1, 255),
        ),
        st.tuples(st.sampled_from(["leave", "join", "turn"]), st.integers(0, 2)),
    ),
    min_size=3,
    max_size=30,
)
BLOCKS = 320


@settings(COMMON, max_examples=30)
@given(actions=actions)
def test_a_mirror_is_one_disk_whoever_comes_and_goes(actions: list[Any]) -> None:
    async def test(scene: RaidScene) -> None:
        scene.window_kb = 4
        bases = [await scene.malloc(f"M{n}", BLOCKS) for n in range(3)]
        array = await scene.mirror("M0", "M1", "M2")
        disk = disk_of(array)
        model = bytearray(BLOCKS * SECTOR)
        async with scene.registry.access(disk, scene.reactor) as access:
            await access.write_zeroes(0, len(model))
            for action in actions:
                if action[0] in ("leave", "join", "turn"):
                    await membership(scene, array, action[0], f"M{action[1]}")
                    continue
                what, block, count, fill = action
                start, length = block * SECTOR, count * SECTOR
                if what == "write":
                    await access.write(start, bytes([fill]) * length)
                    model[start : start + length] = bytes([fill]) * length
                elif what == "zero":
                    await access.write_zeroes(start, length)
                    model[start : start + length] = bytes(length)
                else:
                    assert await access.read(start, length) == model[start : start + length]
            await scene.rebuilt(array)
            assert await access.read(0, len(model)) == model
        for base in bases:
            if array.slot_of(base) is not None:
                assert await scene.read(base) == model

    play(test)


async def membership(scene: RaidScene, array: Any, what: str, name: str) -> None:
    bdev = scene.registry.get(name)
    slot = array.slot_of(bdev)
    if what == "leave" and slot is not None and array.sources != [slot]:
        await scene.arrays.remove_base(name)
    elif what == "join" and slot is None and array.rebuild is None:
        await scene.arrays.add_base("md", name)
    else:
        await asyncio.sleep(0)
