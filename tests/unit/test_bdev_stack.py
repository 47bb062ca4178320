"""Bdevs on bdevs: what passes five filters, and whose end is whose."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from drivebay.bdev.base import Bdev
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.passthru import PassthruBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.bdev.stack import stack
from drivebay.bdev.wishes import Wish, Wishes
from drivebay.errors import InUse
from tests.fakes.stepped import Machine, malloc_bdev
from tests.fakes.threaded import running_reactor

MIB = 1 << 20
PATTERN = (bytes(range(1, 252)) * (MIB // 251 + 1))[:MIB]


def tower(height: int, base: Bdev) -> Bdev:
    for level in range(height):
        base = PassthruBdev(f"P{level}", None, base)
    return base


def test_five_filters_hand_everything_on_and_count_it() -> None:
    bottom = malloc_bdev()
    top = tower(5, bottom)
    with Machine(top) as machine:
        disk = machine.add_queue()
        disk.write(8, PATTERN[:65536])
        disk.write(1024, PATTERN[:4096])
        assert disk.read(8, 65536) == PATTERN[:65536]
        assert disk.read(1024, 4096) == PATTERN[:4096]
        for bdev in (top, top.bases[0], bottom):
            assert bdev is not None
            counted = bdev.iostat()
            assert (counted["write"].ops, counted["write"].bytes) == (2, 69632)
            assert (counted["read"].ops, counted["read"].bytes) == (2, 69632)


def scene(test: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test(BdevRegistry())

    asyncio.run(limited())


async def passthru(registry: BdevRegistry, name: str, base: Bdev) -> Bdev:
    return await stack(
        registry, [base], name, None, lambda: PassthruBdev(name, None, base), by=f"'{name}'"
    )


def test_a_stack_claims_its_base_and_gives_it_back() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = malloc_bdev()
        registry.add(base)
        await passthru(registry, "P0", base)
        assert registry.claims(base).kind == "exclusive_write"
        with pytest.raises(InUse, match="claimed by 'P0'") as caught:
            await passthru(registry, "P1", base)
        assert caught.value.errno == errno.EPERM
        await registry.remove("P0")
        assert registry.claims(base).kind is None
        await passthru(registry, "P1", base)
        await registry.close()

    scene(test)


def test_what_stands_on_a_bdev_goes_with_it() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = malloc_bdev()
        registry.add(base)
        middle = await passthru(registry, "P0", base)
        await passthru(registry, "P1", middle)
        await registry.remove(base.name)
        assert not list(registry)
        assert registry.removed_but_held() == 0

    scene(test)


def test_a_channel_opens_those_below_it_and_closes_them() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = malloc_bdev()
        registry.add(base)
        top = await passthru(registry, "P1", await passthru(registry, "P0", base))
        async with running_reactor() as reactor:
            async with registry.access(top, reactor) as access:
                assert len(registry.channels(base)) == 1
                await access.write(4096, PATTERN[:8192], fua=True)
                assert await access.read(4096, 8192) == PATTERN[:8192]
                await access.write_zeroes(4096, 4096)
                assert await access.read(4096, 8192) == bytes(4096) + PATTERN[4096:8192]
                async with registry.quiesced(top):
                    reading = asyncio.create_task(access.read(8192, 512))
                    await asyncio.sleep(0.05)
                    assert not reading.done()
                assert await reading == PATTERN[4096:4608]
            assert registry.channels(base) == []
            await registry.close()

    scene(test)


def test_a_base_is_free_again_also_when_what_stood_on_it_was_being_examined() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = malloc_bdev()
        registry.add(base)
        async with running_reactor() as reactor:
            looking = asyncio.Event()

            async def look(bdev: Bdev) -> None:
                async with registry.access(bdev, reactor):
                    looking.set()
                    await asyncio.sleep(0.05)

            registry.examining.on_examine(look)
            await passthru(registry, "P0", base)
            await looking.wait()
            await registry.remove("P0")
            assert registry.claims(base).kind is None
            await registry.close()

    scene(test)


def test_a_resize_travels_up() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = MallocBdev("M", None, 512, 4096)
        registry.add(base)
        top = await passthru(registry, "P1", await passthru(registry, "P0", base))
        await registry.resize(base, 2048)
        assert top.num_blocks == 2048
        await registry.close()

    scene(test)


def test_a_wish_is_made_when_its_base_comes_and_again_when_it_comes_back() -> None:
    async def test(registry: BdevRegistry) -> None:
        wishes = Wishes(registry)

        async def make(base: Bdev) -> Bdev:
            return await passthru(registry, "P0", base)

        wish = Wish("passthru", "P0", ("M",), make, lambda: ("bdev_passthru_create", {}))
        assert await wishes.add(wish) is None
        for _ in range(2):
            await registry.create("M", None, lambda: MallocBdev("M", None, 512, 2048))
            assert registry.get("P0").bases == [registry.get("M")]
            await registry.remove("M")
            assert not list(registry)
        wishes.forget(wish)
        await registry.create("M", None, lambda: MallocBdev("M", None, 512, 2048))
        assert [bdev.name for bdev in registry] == ["M"]
        await registry.close()

    scene(test)
