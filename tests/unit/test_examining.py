"""What follows from a new bdev: whose turn it is to be looked into, and who is told of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from drivebay.bdev.registry import BdevRegistry
from tests.fakes.bdevs import FakeBdev

Test = Callable[[Any], Awaitable[None]]
AT_ONCE = 16


def run(test: Test) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test(BdevRegistry())

    asyncio.run(limited())


class Looks:
    """An examiner that waits until it may go on."""

    def __init__(self, registry: Any) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.may_end = asyncio.Event()
        registry.examining.on_examine(self.look)

    async def look(self, bdev: Any) -> None:
        self.begun.append(bdev.name)
        await self.may_end.wait()
        self.ended.append(bdev.name)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_few_bdevs_at_once_are_looked_into_and_in_the_end_all() -> None:
    async def test(registry: Any) -> None:
        looks = Looks(registry)
        names = [f"M{number}" for number in range(3 * AT_ONCE)]
        for name in names:
            registry.add(FakeBdev(name))
        await turns()
        assert looks.begun == names[:AT_ONCE]
        waiting = asyncio.create_task(registry.examining.wait())
        await turns()
        assert not waiting.done()
        looks.may_end.set()
        await waiting
        assert looks.ended == names

    run(test)


def test_a_bdev_that_goes_before_its_turn_is_not_looked_into() -> None:
    async def test(registry: Any) -> None:
        looks = Looks(registry)
        for number in range(AT_ONCE + 2):
            registry.add(FakeBdev(f"M{number}"))
        await turns()
        # It waits for nobody else's look, and none of those has ended.
        await registry.remove(f"M{AT_ONCE}")
        assert not looks.ended
        looks.may_end.set()
        await registry.examining.wait()
        assert f"M{AT_ONCE}" not in looks.begun
        assert f"M{AT_ONCE + 1}" in looks.ended

    run(test)


def test_whoever_waits_for_looks_waits_for_those_that_a_pause_holds_up() -> None:
    async def test(registry: Any) -> None:
        looks = Looks(registry)
        looks.may_end.set()
        with registry.examining.paused():
            registry.add(FakeBdev("M0"))
            waiting = asyncio.create_task(registry.examining.wait())
            await turns()
            assert not looks.begun
            assert not waiting.done()
        await waiting
        assert looks.ended == ["M0"]

    run(test)


def test_only_those_who_waited_for_a_bdev_are_told_and_before_it_is_looked_into() -> None:
    async def test(registry: Any) -> None:
        order: list[str] = []

        def told(who: str, wanted: str) -> None:
            async def arrived(bdev: Any) -> None:
                await asyncio.sleep(0)
                order.append(f"{who} has {bdev.name}")

            registry.examining.on_arrival(arrived, lambda bdev: bdev.name == wanted)

        async def look(bdev: Any) -> None:
            order.append(f"a look into {bdev.name}")

        told("one", "M1")
        told("other", "M2")
        registry.examining.on_examine(look)
        for name in ("M0", "M1", "M2"):
            registry.add(FakeBdev(name))
        await registry.examining.wait()
        assert order[0] == "a look into M0"
        assert [line for line in order if line.endswith("M1")] == ["one has M1", "a look into M1"]
        assert [line for line in order if line.endswith("M2")] == ["other has M2", "a look into M2"]

    run(test)


def test_bdevs_that_come_by_the_thousand_are_a_detail_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(registry: Any) -> None:
        registry.add(FakeBdev("many"))
        await registry.create("one", None, lambda: FakeBdev("one"))
        await registry.remove("many")
        await registry.remove("one")

    with caplog.at_level(logging.DEBUG, "drivebay.bdev.registry"):
        run(test)
    levels = {record.getMessage()[:14]: record.levelno for record in caplog.records}
    assert levels == {
        "bdev 'many' is": logging.DEBUG,
        "bdev 'one' is ": logging.INFO,
    }
    assert len(caplog.records) == 4
