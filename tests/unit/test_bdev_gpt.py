"""Examining disks for partitions: what becomes a bdev, and that nothing else happens."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest

from drivebay.bdev.base import Bdev
from drivebay.bdev.gpt import examine_gpt
from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.reactor.reactor import Reactor
from drivebay.wire.gpt import (
    SPDK_TYPE,
    SPDK_TYPE_OLD,
    Entry,
    Table,
    add_entry,
    new_table,
    pack_protective_mbr,
    parse_header,
    parse_table,
    table_writes,
)
from tests.fakes.threaded import running_reactor

MIB = 1 << 20
BLOCKS = 8 * MIB // 512
DISK, ONE, TWO, THREE = (UUID(f"0a0a0a0a-0000-4000-8000-00000000000{i}") for i in range(4))
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

Test = Callable[[BdevRegistry, Reactor], Awaitable[None]]


def scene(test: Test) -> None:
    async def limited() -> None:
        async with asyncio.timeout(50), running_reactor() as reactor:
            registry = BdevRegistry()
            registry.examining.on_examine(lambda bdev: examine_gpt(registry, reactor, bdev))
            await test(registry, reactor)
            await registry.close()
            assert registry.removed_but_held() == 0

    asyncio.run(limited())


def a_table(block_size: int = 512) -> Table:
    mib = MIB // block_size
    table = new_table(8 * mib, block_size, DISK)
    for number, kind, uuid, name in (
        (1, SPDK_TYPE, ONE, "pool"),
        (2, LINUX, TWO, "the guest's"),
        (3, SPDK_TYPE_OLD, THREE, ""),
    ):
        entry = Entry(number, kind, uuid, number * mib, (number + 1) * mib - 1, 0, name)
        table = add_entry(table, entry)
    return table


async def appear(
    registry: BdevRegistry, reactor: Reactor, pieces: dict[int, bytes], block_size: int = 512
) -> Bdev:
    """A disk with that content, examined."""
    bdev = MallocBdev("M", None, block_size, 8 * MIB // block_size)
    registry.examining.automatic = False
    registry.add(bdev)
    async with registry.access(bdev, reactor) as access:
        for offset, data in pieces.items():
            await access.write(offset, data)
    registry.examining.automatic = True
    registry.examining.examine(bdev)
    await registry.examining.wait()
    return bdev


def pieces_of(table: Table, block_size: int = 512) -> dict[int, bytes]:
    pieces = {0: pack_protective_mbr(8 * MIB // block_size, block_size)}
    for group in table_writes(table, block_size):
        pieces.update(group)
    return pieces


def names(registry: BdevRegistry) -> list[str]:
    return [bdev.name for bdev in registry]


@pytest.mark.parametrize("block_size", [512, 4096])
def test_partitions_of_spdks_types_become_bdevs(block_size: int) -> None:
    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        base = await appear(
            registry, reactor, pieces_of(a_table(block_size), block_size), block_size
        )
        assert names(registry) == ["M", "Mp1", "Mp3"]
        one, three = registry.get("Mp1"), registry.get("Mp3")
        assert (one.num_blocks, one.uuid) == (MIB // block_size, ONE)
        assert (three.num_blocks, three.uuid) == (MIB // block_size - 1, THREE)
        assert registry.claims(base).kind == "exclusive_write"
        assert one.driver_specific() == {
            "gpt": {
                "base_bdev": "M",
                "offset_blocks": MIB // block_size,
                "partition_table_guid": str(DISK),
                "partition_type_guid": str(SPDK_TYPE),
                "unique_partition_guid": str(ONE),
                "partition_name": "pool",
            }
        }
        async with registry.access(one, reactor) as access:
            await access.write(block_size, b"x" * block_size)
        async with registry.access(base, reactor) as access:
            assert await access.read(MIB + block_size, block_size) == b"x" * block_size
        await registry.remove("M")
        assert names(registry) == []

    scene(test)


def test_a_guests_own_partitions_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        root = Entry(1, LINUX, ONE, 2048, 4095, 0, "root")
        table = add_entry(new_table(BLOCKS, 512, DISK), root)
        base = await appear(registry, reactor, pieces_of(table))
        assert names(registry) == ["M"]
        assert registry.claims(base).kind is None
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    scene(test)


def test_the_second_copy_serves_when_the_first_is_bad(caplog: pytest.LogCaptureFixture) -> None:
    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        await appear(registry, reactor, {**pieces_of(a_table()), 512: bytes(512)})
        assert names(registry) == ["M", "Mp1", "Mp3"]
        assert "trying its second copy" in caplog.text

    scene(test)


def test_a_name_or_uuid_that_is_taken_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        registry.add(MallocBdev("other", THREE, 512, 8))
        base = await appear(registry, reactor, pieces_of(a_table()))
        assert names(registry) == ["other", "M"]
        assert registry.claims(base).kind is None
        assert f"uuid {THREE} exists" in caplog.text

    scene(test)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_tiny_disk_is_no_trouble(num_blocks: int) -> None:
    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        registry.add(MallocBdev("tiny", None, 512, num_blocks))
        await asyncio.sleep(0)
        await registry.examining.wait()
        assert names(registry) == ["tiny"]

    scene(test)


def test_a_fuzzed_table_makes_bdevs_within_bounds_or_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both copies flipped in the same places; whatever is said, nothing is raised or written."""

    async def test(registry: BdevRegistry, reactor: Reactor) -> None:
        chance = random.Random(5)
        good = pieces_of(a_table())
        for _ in range(150):
            flipped = {offset: bytearray(data) for offset, data in good.items()}
            for data in flipped.values():
                for _ in range(chance.choice([0, 1, 1, 30])):
                    data[chance.randrange(min(len(data), 384))] = chance.randrange(256)
            bad = {offset: bytes(data) for offset, data in flipped.items()}
            base = await appear(registry, reactor, bad)
            assert {*names(registry)} <= {"M", "Mp1", "Mp3"}
            for bdev in reversed(list(registry)):
                if bdev is not base:
                    await registry.remove(bdev.name)
            async with registry.access(base, reactor) as access:
                for offset, written in bad.items():
                    assert await access.read(offset, len(written)) == written
            await registry.remove("M")
        assert all(record.exc_info is None for record in caplog.records)
        assert "failed" not in caplog.text

    scene(test)


def test_the_written_table_is_what_was_meant() -> None:
    """The scene itself: what appear() writes is a table."""
    pieces = pieces_of(a_table())
    header = parse_header(pieces[512], 1, 512, BLOCKS)
    assert len(parse_table(header, pieces[1024]).entries) == 3
