"""raid1 on members that fail, each when and where the test says.

Their backends are files of a file system of ours.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.bdev.raid.superblock import CONFIGURED, FAILED, MISSING, Superblock, parse
from drivebay.errors import DrivebayError, HostError
from tests.fakes.fuse import FuseFile
from tests.fakes.raid import SB_BYTES, RaidScene, disk_of, play

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_uring]

MIB = 1 << 20
SIZE = 2 * MIB
DATA = b"n" * 4096


class Backends:
    """The files of members A, B, C."""

    def __init__(self, folder: Path) -> None:
        self.files = {name: FuseFile(folder / name, bytes(SIZE)) for name in "ABC"}

    def __getitem__(self, name: str) -> FuseFile:
        return self.files[name]

    def fail(self, name: str, operation: str, start: int = SB_BYTES, end: int = SIZE) -> None:
        """From now on an operation of one file fails; transfers between start and end only."""

        def judge(kind: str, offset: int, length: int) -> int:
            hit = kind == operation and (kind == "flush" or start <= offset < end)
            return -errno.EIO if hit else length

        self[name].judge = judge

    def heal(self, name: str) -> None:
        self[name].judge = lambda _operation, _offset, length: length

    def superblock(self, name: str) -> Superblock:
        sb = parse(bytes(self[name].data[:4096]), name)
        assert sb is not None
        return sb

    def states(self, name: str) -> list[int]:
        return [member.state for member in self.superblock(name).members]


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    made = Backends(tmp_path)
    yield made
    for file in made.files.values():
        file.close()


Test = Callable[[RaidScene], Coroutine[Any, Any, None]]


def mirrored(
    backends: Backends, test: Callable[[RaidScene, Any], Coroutine[Any, Any, None]]
) -> None:
    """Play with a mirror "md" of A and B with superblocks; bdev C is there too."""

    async def scenario(scene: RaidScene) -> None:
        try:
            for name in "ABC":
                await scene.file(name, backends[name].path)
            array = await scene.mirror("A", "B", superblock=True)
            await scene.registry.examining.wait()
            await test(scene, array)
        finally:
            for name in "ABC":
                backends[name].release()

    play(scenario)


def test_a_write_that_one_member_failed_ends_when_the_other_has_noted_it(
    backends: Backends,
) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        backends.fail("B", "write")
        async with scene.registry.access(disk_of(array), scene.reactor) as access:
            noted = asyncio.Event()
            loop = asyncio.get_running_loop()

            def judge(kind: str, offset: int, length: int) -> int:
                if kind == "write" and offset == 0:  # the superblock: it takes its time
                    loop.call_soon_threadsafe(noted.set)
                    backends["A"].hold()
                return length

            backends["A"].judge = judge
            writing = asyncio.create_task(access.write(4096, DATA))
            await noted.wait()
            await asyncio.sleep(0.05)
            assert not writing.done()
            backends.heal("A")
            backends["A"].release()
            await writing
            assert backends.states("A") == [CONFIGURED, FAILED]
            assert array.describe()["num_base_bdevs_operational"] == 1
            assert scene.registry.claims(scene.registry.get("B")).kind is None
            assert await access.read(4096, 4096) == DATA
            assert backends["A"].data[SB_BYTES + 4096 :][:4096] == DATA

    mirrored(backends, test)


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_member_that_fails_is_done_without(backends: Backends, operation: str) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        backends.fail("A", operation)
        async with scene.registry.access(disk_of(array), scene.reactor) as access:
            await asyncio.gather(*(access.write(n * 4096, DATA) for n in range(16)))
            await access.flush()
        assert backends.states("B") == [FAILED, CONFIGURED]
        assert [slot.name for slot in array.members] == ["B"]

    mirrored(backends, test)


def test_what_a_member_cannot_read_is_read_from_another_and_written_anew(
    backends: Backends,
) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        disk = disk_of(array)
        await scene.write(disk, 0, DATA * 4)
        healed: list[int] = []

        def judge(kind: str, offset: int, length: int) -> int:
            """A sector that is bad until it is written."""
            if offset == SB_BYTES + 4096 and kind == "write":
                healed.append(offset)
            return (
                -errno.EIO
                if kind == "read" and offset == SB_BYTES + 4096 and not healed
                else length
            )

        backends["A"].data[SB_BYTES + 4096 :][:4096] = bytes(4096)
        backends["A"].judge = judge
        assert await scene.read(disk, 4096, 4096) == DATA
        await scene.until(lambda: bool(healed), "the repair")
        await scene.until(lambda: not array._repairing, "its end")
        assert len(array.members) == 2
        assert backends["A"].data[SB_BYTES + 4096 :][:4096] == DATA

    mirrored(backends, test)


def test_a_member_that_cannot_be_repaired_is_done_without(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        disk = disk_of(array)
        await scene.write(disk, 0, DATA * 4)
        backends.fail("A", "read")
        assert await scene.read(disk, 4096, 4096) == DATA
        await scene.until(lambda: len(array.members) == 1, "a degraded mirror")
        assert backends.states("B") == [FAILED, CONFIGURED]
        assert await scene.read(disk, 0, 16384) == DATA * 4

    mirrored(backends, test)


def test_what_no_member_can_read_is_an_error_and_costs_no_member(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        for name in "AB":
            backends.fail(name, "read", SB_BYTES + 4096, SB_BYTES + 8192)
        disk = disk_of(array)
        with pytest.raises(HostError):
            await scene.read(disk, 4096, 4096)
        assert await scene.read(disk, 8192, 4096) == bytes(4096)
        assert len(array.members) == 2

    mirrored(backends, test)


def test_what_no_member_can_write_is_an_error_and_one_member_stays(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        for name in "AB":
            backends.fail(name, "write")
        disk = disk_of(array)
        with pytest.raises(HostError):
            await scene.write(disk, 4096, DATA)
        assert [slot.name for slot in array.members] == ["A"]
        assert backends.states("A") == [CONFIGURED, FAILED]
        with pytest.raises(HostError):
            await scene.write(disk, 4096, DATA)
        assert len(array.members) == 1
        backends.heal("A")
        await scene.write(disk, 4096, DATA)

    mirrored(backends, test)


def test_when_nobody_can_note_a_failure_the_disk_ends(backends: Backends) -> None:
    """Otherwise the next start could read from the member that lacks the write."""

    async def test(scene: RaidScene, array: Any) -> None:
        disk = disk_of(array)
        backends.fail("B", "write")
        backends.fail("A", "write", 0, SB_BYTES)
        with pytest.raises(HostError):
            await scene.write(disk, 4096, DATA)
        await scene.until(lambda: array not in list(scene.arrays) or not array.disk, "its end")
        assert array.state == "offline"
        await array.delete(clear=False)

    mirrored(backends, test)


def test_three_members_and_two_fail_at_once(backends: Backends) -> None:
    async def test(scene: RaidScene) -> None:
        for name in "ABC":
            await scene.file(name, backends[name].path)
        array = await scene.mirror("A", "B", "C", superblock=True)
        backends.fail("A", "write")
        backends.fail("C", "write", 0, SB_BYTES)  # its superblock only: found out on the way
        await scene.write(disk_of(array), 0, DATA)
        assert [slot.name for slot in array.members] == ["B"]
        assert backends.states("B") == [FAILED, CONFIGURED, FAILED]

    play(test)


# ---- rebuilds -------------------------------------------------------------------------------


def test_a_write_to_the_window_waits_and_others_do_not(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        disk = disk_of(array)
        await scene.write(disk, 0, os.urandom(MIB))
        await scene.arrays.remove_base("B")
        loop = asyncio.get_running_loop()
        copying = asyncio.Event()

        def judge(kind: str, offset: int, length: int) -> int:
            if kind == "write" and offset == SB_BYTES + 65536:  # the second window
                backends["C"].hold()
                loop.call_soon_threadsafe(copying.set)
            return length

        backends["C"].judge = judge
        await scene.arrays.add_base("md", "C")
        await copying.wait()
        async with scene.registry.access(disk, scene.reactor) as access:
            inside = asyncio.create_task(access.write(65536 + 4096, DATA))
            above = asyncio.create_task(access.write(512 * 1024, DATA))
            await above
            assert await access.read(65536, 4096) == backends["A"].data[SB_BYTES + 65536 :][:4096]
            await asyncio.sleep(0.05)
            assert not inside.done()
            backends.heal("C")
            backends["C"].release()
            await inside
        await scene.rebuilt(array)
        assert backends["A"].data[SB_BYTES:] == backends["C"].data[SB_BYTES:]
        assert backends["C"].data[SB_BYTES + 65536 + 4096 :][:4096] == DATA
        assert backends.states("C") == [CONFIGURED, CONFIGURED]

    mirrored(backends, test)


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_target_that_fails_is_no_member(backends: Backends, operation: str) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        await scene.arrays.remove_base("B")
        if operation == "write":
            backends.fail("C", operation, SB_BYTES + 512 * 1024)
            await scene.arrays.add_base("md", "C")
        else:
            scene.most_mb_per_s = 4
            await scene.arrays.add_base("md", "C")
            backends.fail("C", operation)
        await scene.rebuilt(array)
        assert [slot.name for slot in array.members] == ["A"]
        assert backends.states("A") == [CONFIGURED, MISSING]
        assert scene.registry.claims(scene.registry.get("C")).kind is None
        await scene.write(disk_of(array), 0, DATA)

    mirrored(backends, test)


def test_a_guests_write_that_the_target_fails_succeeds(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        await scene.arrays.remove_base("B")
        scene.most_mb_per_s = 1
        await scene.arrays.add_base("md", "C")
        await scene.until(lambda: array.describe()["process"]["progress"]["blocks"] > 0, "progress")
        backends.fail("C", "write")
        await scene.write(disk_of(array), 0, DATA)
        await scene.rebuilt(array)
        assert [slot.name for slot in array.members] == ["A"]

    mirrored(backends, test)


def test_a_source_that_fails_ends_a_rebuild_but_not_the_disk(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        await scene.arrays.remove_base("B")
        backends.fail("A", "read", SB_BYTES + 512 * 1024)
        await scene.arrays.add_base("md", "C")
        await scene.rebuilt(array)
        assert [slot.name for slot in array.members] == ["A"]
        assert await scene.read(disk_of(array), 0, 4096) == bytes(4096)

    mirrored(backends, test)


def test_a_target_that_takes_no_superblock_is_refused(backends: Backends) -> None:
    async def test(scene: RaidScene, array: Any) -> None:
        await scene.arrays.remove_base("B")
        backends.fail("C", "write", 0, SB_BYTES)
        with pytest.raises(DrivebayError, match="no superblock"):
            await scene.arrays.add_base("md", "C")
        assert array.rebuild is None
        assert array.describe()["num_base_bdevs_operational"] == 1
        assert scene.registry.claims(scene.registry.get("C")).kind is None

    mirrored(backends, test)
