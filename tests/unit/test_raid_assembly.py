"""Superblocks bring RAIDs back: SPDK's own, in any order, with members that are stale or broken."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from drivebay.bdev.raid.superblock import CONFIGURED, MISSING, Superblock, parse
from drivebay.errors import AlreadyExists, NotFound
from tests.fakes.raid import SB_BYTES, RaidScene, disk_of, play

DATA = Path(__file__).parents[1] / "data" / "raid"
MIB = 1 << 20
PATTERN = bytes(n % 251 + 1 for n in range(8192))


def superblock_in(path: Path) -> Superblock:
    with path.open("rb") as file:
        sb = parse(file.read(4096), path.name)
    assert sb is not None
    return sb


def images(folder: Path) -> None:
    for name in ("raid-m0", "raid-m1"):
        with lzma.open(DATA / f"{name}.img.xz") as image:
            (folder / name).write_bytes(image.read())


SPDK = json.loads((DATA / "spdk-raid1.json").read_text())
MEMBERS = SPDK["raid"][0]["base_bdevs_list"]


async def spdk_member(scene: RaidScene, folder: Path, number: int) -> None:
    await scene.file(f"R{number}", folder / f"raid-m{number}", UUID(MEMBERS[number]["uuid"]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_spdk_made_it_and_here_it_is(tmp_path: Path, order: tuple[int, int]) -> None:
    async def test(scene: RaidScene) -> None:
        images(tmp_path)
        await spdk_member(scene, tmp_path, order[0])
        (array,) = scene.arrays
        # SPDK waits for the other one as well, and shows this.
        assert array.state == "configuring"
        assert array.describe()["num_base_bdevs_discovered"] == 1
        assert array.describe()["num_base_bdevs_operational"] == 2
        await spdk_member(scene, tmp_path, order[1])
        assert [{"name": array.name, **array.describe()}] == SPDK["raid"]
        disk = disk_of(array)
        assert disk.num_blocks == SPDK["bdev"]["num_blocks"]
        assert hashlib.sha256(await scene.read(disk)).hexdigest() == SPDK["sha256"]
        await scene.write(disk, 4096, PATTERN)
        assert await scene.read(disk, 4096, 8192) == PATTERN

    play(test)
    for name in ("raid-m0", "raid-m1"):
        content = (tmp_path / name).read_bytes()
        assert content[SB_BYTES + 4096 :][:8192] == PATTERN
        assert superblock_in(tmp_path / name).seq == 2


def test_one_of_two_is_begun_with_when_the_operator_says_so(tmp_path: Path) -> None:
    async def test(scene: RaidScene) -> None:
        images(tmp_path)
        await spdk_member(scene, tmp_path, 0)
        with pytest.raises(NotFound):
            await scene.arrays.remove_base(str(uuid4()))
        await scene.arrays.remove_base(MEMBERS[1]["uuid"])
        (array,) = scene.arrays
        assert array.state == "online"
        assert array.describe()["num_base_bdevs_operational"] == 1
        content = await scene.read(disk_of(array))
        assert hashlib.sha256(content).hexdigest() == SPDK["sha256"]
        await scene.write(disk_of(array), 0, PATTERN[:4096])
        # The other one comes after all: it is stale, and rebuilt.
        await spdk_member(scene, tmp_path, 1)
        await scene.rebuilt(array)
        assert array.describe()["num_base_bdevs_operational"] == 2

    play(test)
    members = [(tmp_path / f"raid-m{n}").read_bytes() for n in (0, 1)]
    assert members[0] == members[1]
    assert members[1][SB_BYTES:][:4096] == PATTERN[:4096]


def two_files(folder: Path) -> list[UUID]:
    for name in "AB":
        with (folder / name).open("wb") as file:
            file.truncate(4 * MIB)
    return [uuid4(), uuid4()]


def played_apart(folder: Path, uuids: list[UUID]) -> None:
    """A mirror whose second member has missed the last write."""

    async def test(scene: RaidScene) -> None:
        for name, uuid in zip("AB", uuids, strict=True):
            await scene.file(name, folder / name, uuid)
        array = await scene.mirror("A", "B", superblock=True)
        await scene.write(disk_of(array), 0, b"1" * 4096)
        await scene.registry.remove("B")
        await scene.write(disk_of(array), 0, b"2" * 4096)

    play(test)


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_a_stale_member_is_no_source(tmp_path: Path, order: str) -> None:
    uuids = two_files(tmp_path)
    played_apart(tmp_path, uuids)
    assert [m.state for m in superblock_in(tmp_path / "A").members] == [CONFIGURED, MISSING]
    assert [m.state for m in superblock_in(tmp_path / "B").members] == [CONFIGURED, CONFIGURED]

    async def test(scene: RaidScene) -> None:
        for name in order:
            await scene.file(name, tmp_path / name, uuids["AB".index(name)])
        (array,) = scene.arrays
        await scene.until(lambda: len(array.sources) == 2, "both members")
        assert await scene.read(disk_of(array), 0, 4096) == b"2" * 4096

    play(test)
    contents = [(tmp_path / name).read_bytes() for name in "AB"]
    assert contents[0] == contents[1]
    assert contents[1][SB_BYTES:][:4096] == b"2" * 4096


def test_two_halves_that_went_on_alone_do_not_overwrite_each_other(tmp_path: Path) -> None:
    uuids = two_files(tmp_path)
    played_apart(tmp_path, uuids)

    async def alone(scene: RaidScene) -> None:
        await scene.file("B", tmp_path / "B", uuids[1])
        await scene.arrays.remove_base(str(uuids[0]))
        (array,) = scene.arrays
        await scene.write(disk_of(array), 0, b"3" * 4096)

    play(alone)

    async def together(scene: RaidScene) -> None:
        # Two half arrays of the same age: the first one here is the disk.
        await scene.file("A", tmp_path / "A", uuids[0])
        await scene.file("B", tmp_path / "B", uuids[1])
        (array,) = scene.arrays
        assert len(array.members) == 1
        assert scene.registry.claims(scene.registry.get("B")).kind is None

    play(together)
    assert (tmp_path / "B").read_bytes()[SB_BYTES:][:4096] == b"3" * 4096


def test_a_rebuild_that_was_cut_short_begins_anew(tmp_path: Path) -> None:
    uuids = two_files(tmp_path)
    played_apart(tmp_path, uuids)

    async def cut_short(scene: RaidScene) -> None:
        scene.most_mb_per_s = 1
        await scene.file("A", tmp_path / "A", uuids[0])
        await scene.file("B", tmp_path / "B", uuids[1])
        (array,) = scene.arrays
        await scene.until(lambda: array.rebuild is not None, "a rebuild")
        states = [m.state for m in superblock_in(tmp_path / "B").members]
        assert states == [CONFIGURED, MISSING]

    play(cut_short)
    assert superblock_in(tmp_path / "A").members[1].state == MISSING
    for order in ("BA", "AB"):

        async def again(scene: RaidScene, order: str = order) -> None:
            for name in order:
                await scene.file(name, tmp_path / name, uuids["AB".index(name)])
            (array,) = scene.arrays
            await scene.until(lambda: len(array.sources) == 2, "both members")

        play(again)
        assert (tmp_path / "A").read_bytes() == (tmp_path / "B").read_bytes()


def test_a_deleted_one_comes_back_unless_it_was_cleared(tmp_path: Path) -> None:
    uuids = two_files(tmp_path)

    async def test(scene: RaidScene) -> None:
        for name, uuid in zip("AB", uuids, strict=True):
            await scene.file(name, tmp_path / name, uuid)
        array = await scene.mirror("A", "B", superblock=True)
        await scene.registry.examining.wait()
        await array.delete(clear=False)
        with pytest.raises(AlreadyExists, match="has the superblock of RAID 'md'"):
            await scene.mirror("A", "B", name="other")
        for name in "AB":
            await scene.registry.remove(name)
        for name, uuid in zip("AB", uuids, strict=True):
            await scene.file(name, tmp_path / name, uuid)
        (array,) = scene.arrays
        assert array.state == "online"
        assert array.call() is None
        await scene.registry.examining.wait()
        await array.delete(clear=True)
        assert not list(scene.arrays)
        other = await scene.mirror("A", "B", name="other")
        assert other.call() == (
            "bdev_raid_create",
            {
                "name": "other",
                "uuid": str(other.uuid),
                "raid_level": "raid1",
                "base_bdevs": ["A", "B"],
            },
        )

    play(test)


def test_a_broken_superblock_makes_no_raid_and_is_left_as_it_is(tmp_path: Path) -> None:
    images(tmp_path)
    path = tmp_path / "raid-m0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)

    async def test(scene: RaidScene) -> None:
        await spdk_member(scene, tmp_path, 0)
        assert not list(scene.arrays)
        assert scene.registry.claims(scene.registry.get("R0")).kind is None

    play(test)
    assert path.read_bytes() == content


def test_a_member_that_claims_more_than_its_bdev_has_is_not_taken(tmp_path: Path) -> None:
    images(tmp_path)
    path = tmp_path / "raid-m0"
    with path.open("r+b") as file:
        file.truncate(16 * MIB)

    async def test(scene: RaidScene) -> None:
        await spdk_member(scene, tmp_path, 0)
        (array,) = scene.arrays
        assert array.state == "configuring"
        assert not array.members
        assert scene.registry.claims(scene.registry.get("R0")).kind is None
        await array.delete(clear=False)

    play(test)


def test_bases_grow_and_the_mirror_with_them(tmp_path: Path) -> None:
    async def test(scene: RaidScene) -> None:
        for name in "AB":
            (tmp_path / name).write_bytes(bytes(4 * MIB))
            await scene.file(name, tmp_path / name)
        array = await scene.mirror("A", "B", superblock=True)
        assert disk_of(array).num_blocks == 6144
        for name in "AB":
            with (tmp_path / name).open("r+b") as file:
                file.truncate(8 * MIB)
            await scene.registry.resize(scene.registry.get(name), 16384)
        assert disk_of(array).num_blocks == 14336
        assert superblock_in(tmp_path / "B").raid_size == 14336

    play(test)
