"""Bdevs in a registry with RAIDs over them, on one real reactor. Context: tests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from drivebay.bdev.base import Bdev
from drivebay.bdev.file import FileBdev
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.raid.array import Array
from drivebay.bdev.raid.arrays import Arrays
from drivebay.bdev.registry import BdevRegistry
from drivebay.reactor.reactor import Reactor
from tests.fakes.threaded import running_reactor

PATIENCE_S = 20.0
SB_BYTES = 1 << 20  # where data begin on a member with a superblock


class RaidScene:
    """Everything that a target has below its RAIDs."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.registry = BdevRegistry()
        self.window_kb = 64
        self.most_mb_per_s = 0
        self.arrays = Arrays(
            self.registry, lambda: reactor, lambda: (self.window_kb, self.most_mb_per_s)
        )

    async def malloc(
        self, name: str, blocks: int = 4096, *, block_size: int = 512, uuid: UUID | None = None
    ) -> Bdev:
        uuid = uuid or uuid4()
        return await self.registry.create(
            name, uuid, lambda: MallocBdev(name, uuid, block_size, blocks)
        )

    async def file(self, name: str, path: Path, uuid: UUID | None = None) -> Bdev:
        uuid = uuid or uuid4()
        bdev = await self.registry.create(name, uuid, lambda: FileBdev(name, uuid, str(path), 512))
        await self.registry.examining.wait()
        return bdev

    async def mirror(self, *bases: str, superblock: bool = False, name: str = "md") -> Array:
        return await self.arrays.create(name, "raid1", 0, list(bases), None, superblock=superblock)

    async def read(self, bdev: Bdev, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:
            length = bdev.num_blocks * bdev.block_size - offset
        async with self.registry.access(bdev, self.reactor) as access:
            return await access.read(offset, length)

    async def write(self, bdev: Bdev, offset: int, data: bytes) -> None:
        async with self.registry.access(bdev, self.reactor) as access:
            await access.write(offset, data)

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
            await asyncio.sleep(0.001)

    async def rebuilt(self, array: Array) -> None:
        await self.until(lambda: array.rebuild is None, "the end of a rebuild")


def disk_of(array: Array) -> Bdev:
    assert array.disk is not None
    return array.disk


@contextlib.asynccontextmanager
async def raid_scene() -> AsyncIterator[RaidScene]:
    async with running_reactor() as reactor:
        scene = RaidScene(reactor)
        yield scene
        await scene.registry.close()
        assert scene.registry.removed_but_held() == 0
        assert not list(scene.arrays)


def play(test: Callable[[RaidScene], Coroutine[Any, Any, None]]) -> None:
    """Run one test in a scene of its own."""

    async def limited() -> None:
        async with asyncio.timeout(3 * PATIENCE_S), raid_scene() as scene:
            await test(scene)

    asyncio.run(limited())
