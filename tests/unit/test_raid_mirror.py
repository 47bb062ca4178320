"""raid1 as guests and operators meet it: members come, go, fail, and are rebuilt."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from drivebay.bdev.passthru import PassthruBdev
from drivebay.bdev.raid.array import Array
from drivebay.bdev.stack import stack
from drivebay.errors import DrivebayError, HostError, InUse, NotFound, StateError
from tests.fakes.raid import SB_BYTES, RaidScene, disk_of, play

DATA = Path(__file__).parents[1] / "data" / "raid"
MIB = 1 << 20
PATTERN = (bytes(range(1, 252)) * (4 * MIB // 251 + 1))[: 4 * MIB]


async def written(scene: RaidScene, array: Array) -> bytes:
    """Fill the disk; returns what it holds."""
    disk = disk_of(array)
    data = PATTERN[: disk.num_blocks * disk.block_size]
    await scene.write(disk, 0, data)
    return data


def test_every_member_has_everything() -> None:
    async def test(scene: RaidScene) -> None:
        bases = [await scene.malloc(name) for name in "ABC"]
        array = await scene.mirror("A", "B", "C")
        data = await written(scene, array)
        assert await scene.read(disk_of(array)) == data
        for base in bases:
            assert await scene.read(base) == data
        async with scene.registry.access(disk_of(array), scene.reactor) as access:
            await access.write_zeroes(4096, 8192)
            await access.unmap(65536, 4096)
            await access.flush()
        for base in bases:
            assert await scene.read(base, 4096, 8192) == bytes(8192)

    play(test)


def test_reads_go_to_the_member_with_the_least_to_do() -> None:
    async def test(scene: RaidScene) -> None:
        bases = [await scene.malloc(name) for name in "AB"]
        disk = disk_of(await scene.mirror("A", "B"))
        await scene.registry.examining.wait()
        before = [base.iostat()["read"].ops for base in bases]
        async with scene.registry.access(disk, scene.reactor) as access:
            await asyncio.gather(*(access.read(0, 2 * MIB) for _ in range(8)))
        reads = [base.iostat()["read"].ops - n for base, n in zip(bases, before, strict=True)]
        assert sum(reads) == 8
        assert min(reads) >= 2

    play(test)


def test_a_member_leaves_and_another_one_is_rebuilt() -> None:
    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        gone = await scene.malloc("B")
        new = await scene.malloc("C")
        array = await scene.mirror("A", "B")
        data = await written(scene, array)
        await scene.arrays.remove_base("B")
        assert scene.registry.claims(gone).kind is None
        assert array.describe()["num_base_bdevs_operational"] == 1
        assert await scene.read(disk_of(array)) == data
        await scene.arrays.add_base("md", "C")
        shown = array.describe()
        assert shown["process"]["type"] == "rebuild"
        assert shown["process"]["target"] == "C"
        assert shown["num_base_bdevs_operational"] == 2
        with pytest.raises(StateError, match="being rebuilt"):
            await scene.arrays.add_base("md", "B")
        await scene.rebuilt(array)
        assert "process" not in array.describe()
        assert await scene.read(new) == data
        await scene.registry.remove("A")
        assert await scene.read(disk_of(array)) == data

    play(test)


def test_the_last_member_takes_the_disk_with_it() -> None:
    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        await scene.malloc("B")
        array = await scene.mirror("A", "B")
        async with scene.registry.access(disk_of(array), scene.reactor) as access:
            await scene.registry.remove("A")
            await access.write(0, PATTERN[:512])
            await scene.registry.remove("B")
            with pytest.raises(HostError):
                await access.write(0, PATTERN[:512])
            with pytest.raises(HostError):
                await access.read(0, 512)
        assert array.state == "offline"
        assert not list(scene.arrays)

    play(test)


@pytest.mark.parametrize("superblock", [False, True])
def test_guests_write_all_the_while(superblock: bool) -> None:
    """No byte differs between the members after a rebuild under writes everywhere."""

    async def test(scene: RaidScene) -> None:
        blocks = 4096 + SB_BYTES // 512
        bases = {name: await scene.malloc(name, blocks) for name in "AB"}
        array = await scene.mirror("A", "B", superblock=superblock)
        disk = disk_of(array)
        model = bytearray(await written(scene, array))
        await scene.arrays.remove_base("B")
        await scene.write(disk, 0, bytes(4096))
        model[:4096] = bytes(4096)
        scene.window_kb = 16
        scene.most_mb_per_s = 4  # it shall not be over before the writers begin
        await scene.arrays.add_base("md", "B")

        async def writer(lane: int) -> int:
            """Its own blocks, one after the other, over and over: it knows what is there."""
            rounds = 0
            async with scene.registry.access(disk, scene.reactor) as access:
                while array.rebuild is not None:
                    at = (lane + 8 * rounds) * 4096 % len(model)
                    data = bytes([rounds % 251 + 1]) * 4096
                    await access.write(at, data)
                    model[at : at + 4096] = data
                    assert await access.read(at, 4096) == data
                    rounds += 1
            return rounds

        counts = await asyncio.gather(*(writer(lane) for lane in range(8)))
        assert min(counts) > 4
        start = SB_BYTES if superblock else 0
        length = disk.num_blocks * 512
        assert await scene.read(disk) == model
        for base in bases.values():
            assert await scene.read(base, start, length) == model

    play(test)


def test_a_rebuild_keeps_to_its_bandwidth() -> None:
    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        await scene.malloc("B")
        array = await scene.mirror("A", "B")
        await scene.arrays.remove_base("B")
        scene.most_mb_per_s = 8
        began = asyncio.get_running_loop().time()
        await scene.arrays.add_base("md", "B")
        await asyncio.sleep(0.1)
        progress = array.describe()["process"]["progress"]
        assert 0 < progress["blocks"] < 4096
        assert progress["percent"] == progress["blocks"] * 100 // 4096
        await scene.rebuilt(array)
        took = asyncio.get_running_loop().time() - began
        assert 0.23 < took < 1.5  # 2 MiB

    play(test)


def test_the_target_leaves_in_the_middle() -> None:
    async def test(scene: RaidScene) -> None:
        for name in "ABC":
            await scene.malloc(name)
        array = await scene.mirror("A", "B")
        data = await written(scene, array)
        await scene.arrays.remove_base("B")
        scene.most_mb_per_s = 1
        await scene.arrays.add_base("md", "B")
        await scene.registry.remove("B")
        assert array.rebuild is None
        assert array.describe()["num_base_bdevs_operational"] == 1
        scene.most_mb_per_s = 0
        await scene.arrays.add_base("md", "C")
        await scene.rebuilt(array)
        assert await scene.read(scene.registry.get("C")) == data

    play(test)


def test_the_only_source_leaves_in_the_middle() -> None:
    """What is half copied is no disk."""

    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        base = await scene.malloc("B")
        array = await scene.mirror("A", "B")
        await scene.arrays.remove_base("B")
        scene.most_mb_per_s = 1
        await scene.arrays.add_base("md", "B")
        await scene.registry.remove("A")
        assert array.state == "offline"
        assert scene.registry.claims(base).kind is None

    play(test)


def test_a_filter_stands_on_a_mirror_and_cannot_go_under_it() -> None:
    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        await scene.malloc("B")
        disk = disk_of(await scene.mirror("A", "B"))
        await stack(
            scene.registry, [disk], "P", None, lambda: PassthruBdev("P", None, disk), by="'P'"
        )
        await scene.arrays.remove_base("B")
        with pytest.raises(DrivebayError, match="stands on RAID 'md' itself") as caught:
            await scene.arrays.add_base("md", "P")
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(DrivebayError, match="itself"):
            await scene.arrays.add_base("md", "md")

    play(test)


def test_a_base_of_another_kind_is_refused() -> None:
    async def test(scene: RaidScene) -> None:
        await scene.malloc("A")
        await scene.malloc("B")
        await scene.malloc("small", 4000)
        await scene.malloc("coarse", 4096, block_size=4096)
        array = await scene.mirror("A", "B")
        await scene.arrays.remove_base("B")
        for name, code in (("small", errno.EINVAL), ("coarse", errno.EINVAL), ("A", errno.EPERM)):
            with pytest.raises(DrivebayError) as caught:
                await scene.arrays.add_base("md", name)
            assert caught.value.errno == code
        with pytest.raises(NotFound):
            await scene.arrays.add_base("md", "nosuch")
        await scene.arrays.add_base("md", "B")
        await scene.rebuilt(array)
        with pytest.raises(DrivebayError, match="no empty slot"):
            await scene.arrays.add_base("md", "small")
        with pytest.raises(InUse):
            scene.registry.claim(scene.registry.get("A"), "somebody")

    play(test)
