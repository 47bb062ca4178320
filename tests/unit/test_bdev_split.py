"""Split: how many parts there are, where they lie, and whose claim they share."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from drivebay.bdev.null import NullBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.bdev.split import split
from drivebay.bdev.stack import part_uuid
from drivebay.errors import AlreadyExists, InUse, StateError, UsageError

MIB = 1 << 20


def scene(test: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            registry = BdevRegistry()
            await test(registry)
            await registry.close()
            assert registry.removed_but_held() == 0

    asyncio.run(limited())


def null(name: str, num_blocks: int, block_size: int = 512) -> NullBdev:
    return NullBdev(name, None, block_size, num_blocks)


def test_its_uuids_are_spdks() -> None:
    """A recorded answer of SPDK's."""
    base = NullBdev("MS", UUID("830b066c-0f6c-40a1-9110-2e2483818fa0"), 512, 65536)
    assert part_uuid(base, 0, 16384) == UUID("6cd39cbc-6154-5503-99e6-a06a0166ba8d")
    assert part_uuid(base, 32768, 16384) == UUID("a6f03144-bcaf-5be2-88e8-c451b659f19c")


@pytest.mark.parametrize(
    ("blocks", "count", "size_mb", "expected"),
    [
        (65536, 4, 0, [(0, 16384), (16384, 16384), (32768, 16384), (49152, 16384)]),
        (100, 3, 0, [(0, 33), (33, 33), (66, 33)]),
        (8192, 3, 1, [(0, 2048), (2048, 2048), (4096, 2048)]),
        (5000, 3, 1, [(0, 2048), (2048, 2048)]),  # no more than fit
        (2048, 1, 1, [(0, 2048)]),
        (2047, 1, 1, []),
    ],
)
def test_the_parts(blocks: int, count: int, size_mb: int, expected: list[tuple[int, int]]) -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("N", blocks)
        registry.add(base)
        parts: list[Any] = await split(registry, base, "N", count, size_mb)
        assert [(part.offset_blocks, part.num_blocks) for part in parts] == expected
        assert [part.name for part in parts] == [f"Np{i}" for i in range(len(expected))]
        assert registry.claims(base).kind == ("exclusive_write" if expected else None)

    scene(test)


@pytest.mark.parametrize(
    ("count", "size_mb", "said"),
    [
        (0, 0, "give 1 to"),
        (1 << 31, 1, "give 1 to"),
        (101, 0, "has 100 blocks"),
        (1, (1 << 64) - 1, "no size"),
    ],
)
def test_nonsense_is_refused(count: int, size_mb: int, said: str) -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("N", 100)
        registry.add(base)
        with pytest.raises(UsageError, match=said):
            await split(registry, base, "N", count, size_mb)
        assert registry.claims(base).kind is None

    scene(test)


def test_the_claim_ends_with_the_last_part() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("N", 100)
        registry.add(base)
        await split(registry, base, "N", 2, 0)
        with pytest.raises(InUse, match="claimed by the split of 'N'"):
            await split(registry, base, "X", 2, 0)
        await registry.remove("Np1")
        assert registry.claims(base).kind == "exclusive_write"
        await registry.remove("Np0")
        assert registry.claims(base).kind is None
        await split(registry, base, "N", 2, 0)

    scene(test)


@pytest.mark.parametrize("taken", ["Np0", "Np1", "Np2"])
def test_a_name_that_is_taken_undoes_all(taken: str) -> None:
    async def test(registry: BdevRegistry) -> None:
        base, other = null("N", 99), null(taken, 10)
        registry.add(base)
        registry.add(other)
        with pytest.raises(AlreadyExists, match=taken):
            await split(registry, base, "N", 3, 0)
        assert [bdev.name for bdev in registry] == ["N", taken]
        assert registry.claims(base).kind is None
        await registry.remove(taken)
        assert len(await split(registry, base, "N", 3, 0)) == 3

    scene(test)


def test_the_parts_go_with_the_base() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("N", 99)
        registry.add(base)
        await split(registry, base, "N", 3, 0)
        await registry.remove("N")
        assert not list(registry)

    scene(test)


def test_a_base_that_goes_while_it_is_split_leaves_nothing() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("N", 99)
        registry.add(base)
        splitting = asyncio.create_task(split(registry, base, "N", 3, 0))
        await asyncio.sleep(0)
        await registry.remove("N")
        with pytest.raises(StateError):
            await splitting
        assert not list(registry)

    scene(test)


def test_parts_keep_their_place_when_the_base_changes() -> None:
    async def test(registry: BdevRegistry) -> None:
        base = null("M", 400)
        registry.add(base)
        parts = await split(registry, base, "M", 4, 0)
        await registry.resize(base, 350)
        assert [part.num_blocks for part in parts] == [100, 100, 100, 50]
        await registry.resize(base, 250)  # the last one can't have less than nothing
        assert [part.num_blocks for part in parts] == [100, 100, 50, 50]
        await registry.resize(base, 400)
        assert [part.num_blocks for part in parts] == [100] * 4
        await registry.resize(base, 500)
        assert [part.num_blocks for part in parts] == [100] * 4

    scene(test)
