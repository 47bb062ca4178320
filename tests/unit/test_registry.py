"""The registry of bdevs: names, one channel for each reactor, hot remove, size, claims."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest

from drivebay.bdev.registry import BdevRegistry
from drivebay.errors import AlreadyExists, HostError, InUse, NotFound, StateError, UsageError
from tests.fakes.bdevs import FakeBdev, FakeReactor

# The fakes have the shape of the real ones, not their types.
Test = Callable[[Any], Awaitable[None]]


def run(test: Test) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test(BdevRegistry())

    asyncio.run(limited())


async def settle() -> None:
    """Let everything happen that can happen now, worker threads included."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def test_a_bdev_is_found_by_name_alias_and_uuid() -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0")
        bdev.aliases.append("lvs/one")
        registry.add(bdev)
        for name in ("M0", "lvs/one", str(bdev.uuid), str(bdev.uuid).upper()):
            assert registry.get(name) is bdev
        with pytest.raises(NotFound, match="'m0'"):
            registry.get("m0")

    run(test)


def test_aliases_change_and_go_with_their_bdev() -> None:
    async def test(registry: Any) -> None:
        bdev, other = FakeBdev("M0"), FakeBdev("M1")
        bdev.aliases.append("lvs/old")
        registry.add(bdev)
        registry.add(other)
        registry.set_aliases(bdev, ["lvs/old", "lvs/new"])
        registry.set_aliases(bdev, ["lvs/new"])
        assert registry.get("lvs/new") is bdev
        assert registry.is_free("lvs/old")
        for taken in ("lvs/new", "M0", str(bdev.uuid)):
            with pytest.raises(AlreadyExists):
                registry.set_aliases(other, ["lvs/free", taken])
        assert other.aliases == []
        assert registry.is_free("lvs/free")
        await registry.remove("lvs/new")
        for name in ("M0", "lvs/new", str(bdev.uuid)):
            assert registry.is_free(name)
        with pytest.raises(StateError):
            registry.set_aliases(bdev, ["lvs/late"])

    run(test)


def test_iteration_is_in_the_order_of_creation() -> None:
    async def test(registry: Any) -> None:
        bdevs = [FakeBdev(name) for name in ("z", "a", "m")]
        for bdev in bdevs:
            registry.add(bdev)
        assert list(registry) == bdevs
        await registry.remove("a")
        assert list(registry) == [bdevs[0], bdevs[2]]

    run(test)


def test_names_uuids_and_aliases_are_unique() -> None:
    async def test(registry: Any) -> None:
        first = FakeBdev("M0")
        registry.add(first)
        with pytest.raises(AlreadyExists):
            registry.add(FakeBdev("M0"))
        with pytest.raises(AlreadyExists):
            registry.add(FakeBdev("M1", first.uuid))
        with pytest.raises(AlreadyExists):
            registry.add(FakeBdev(str(first.uuid)))
        with pytest.raises(UsageError):
            registry.add(FakeBdev(""))

    run(test)


def test_a_name_is_reserved_while_its_bdev_is_built() -> None:
    async def test(registry: Any) -> None:
        begun, may_end = threading.Event(), threading.Event()

        def build() -> FakeBdev:
            begun.set()
            assert may_end.wait(10)
            return FakeBdev("F0")

        first = asyncio.create_task(registry.create("F0", None, build))
        await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(AlreadyExists):
            await registry.create("F0", None, lambda: FakeBdev("F0"))
        assert list(registry) == []
        may_end.set()
        assert await first is registry.get("F0")

    run(test)


def test_a_failed_build_frees_the_name_and_gives_its_promise_back() -> None:
    async def test(registry: Any) -> None:
        released = []

        def fail() -> FakeBdev:
            raise HostError("no such file", errno.ENOENT)

        for _ in range(2):
            with pytest.raises(HostError):
                await registry.create("F0", None, fail, lambda: released.append(1))
        assert released == [1, 1]
        bdev = await registry.create("F0", None, lambda: FakeBdev("F0"))
        with pytest.raises(AlreadyExists):
            await registry.create("F0", None, fail, lambda: released.append(2))
        assert released == [1, 1, 2]
        assert registry.get("F0") is bdev

    run(test)


def test_a_creation_goes_on_when_its_client_hangs_up() -> None:
    async def test(registry: Any) -> None:
        begun, may_end = threading.Event(), threading.Event()

        def build() -> FakeBdev:
            begun.set()
            assert may_end.wait(10)
            return FakeBdev("F0")

        creating = asyncio.create_task(registry.create("F0", None, build))
        await asyncio.to_thread(begun.wait, 10)
        creating.cancel()
        may_end.set()
        assert (await registry.wait_for("F0", 10)).name == "F0"

    run(test)


def test_two_users_on_one_reactor_share_one_channel() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        bdev.may_open.clear()
        opening = [asyncio.create_task(registry.open_channel(bdev, reactor)) for _ in range(3)]
        await settle()
        bdev.may_open.set()
        channels = {id(await task) for task in opening}
        assert len(channels) == 1
        assert bdev.steps == ["open", "activate"]
        channel = await opening[0]
        await registry.close_channel(channel)
        await registry.close_channel(channel)
        assert "close" not in bdev.steps
        await registry.close_channel(channel)
        assert bdev.steps == ["open", "activate", "close"]
        with pytest.raises(StateError):
            await registry.close_channel(channel)

    run(test)


def test_each_reactor_has_its_own_channel() -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0")
        registry.add(bdev)
        first = await registry.open_channel(bdev, FakeReactor())
        second = await registry.open_channel(bdev, FakeReactor())
        assert first is not second
        assert registry.channels(bdev) == [first, second]

    run(test)


def test_a_channel_that_is_closing_is_opened_anew() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        first = await registry.open_channel(bdev, reactor)
        bdev.gates["close"].clear()
        closing = asyncio.create_task(registry.close_channel(first))
        await settle()
        opening = asyncio.create_task(registry.open_channel(bdev, reactor))
        await settle()
        assert not opening.done()
        bdev.gates["close"].set()
        await closing
        assert await opening is not first
        assert bdev.steps == ["open", "activate", "close", "open", "activate"]

    run(test)


def test_a_channel_that_fails_to_open_leaves_nothing() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        bdev.fails_to_open = HostError("too many files", errno.EMFILE)
        for _ in range(2):
            with pytest.raises(HostError):
                await registry.open_channel(bdev, reactor)
        await settle()
        bdev.fails_to_open = None
        await registry.open_channel(bdev, reactor)
        assert bdev.steps == ["open", "open", "open", "activate"]

    run(test)


def test_a_user_that_gives_up_while_opening_leaves_nothing() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        bdev.may_open.clear()
        opening = asyncio.create_task(registry.open_channel(bdev, reactor))
        await settle()
        opening.cancel()
        await settle()
        bdev.may_open.set()
        await settle()
        assert bdev.steps == ["open", "activate", "close"]

    run(test)


def test_hot_remove_tells_drains_and_closes_in_this_order() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        channel = await registry.open_channel(bdev, reactor)

        async def listener(about: FakeBdev, event: str) -> None:
            await asyncio.sleep(0)
            about.steps.append(f"told {event}")

        registry.subscribe(bdev, listener)
        bdev.gates["remove"].clear()
        removing = asyncio.create_task(registry.remove("M0"))
        await settle()
        assert not removing.done(), "I/O is still in flight"
        with pytest.raises(NotFound):
            registry.get("M0")
        with pytest.raises(StateError):
            await registry.open_channel(bdev, reactor)
        bdev.gates["remove"].set()
        await removing
        assert bdev.steps == ["open", "activate", "told remove", "remove"]
        assert registry.removed_but_held() == 1
        await registry.close_channel(channel)
        assert bdev.steps[-2:] == ["close", "bdev closed"]
        assert registry.removed_but_held() == 0
        assert bdev.closed_by != threading.main_thread().name, "closing may block"

    run(test)


def test_a_slow_bdev_is_named_while_its_removal_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("drivebay.bdev.registry.SLOW_SECONDS", 0.01)

    async def test(registry: Any) -> None:
        bdev = FakeBdev("Slow0")
        registry.add(bdev)
        await registry.open_channel(bdev, FakeReactor())
        bdev.gates["remove"].clear()
        removing = asyncio.create_task(registry.remove("Slow0"))
        while "slow" not in caplog.text:
            await asyncio.sleep(0.01)
        assert not removing.done()
        bdev.gates["remove"].set()
        await removing

    run(test)
    assert "'Slow0'" in caplog.text


def test_the_name_is_free_while_the_old_bdev_is_still_held() -> None:
    async def test(registry: Any) -> None:
        old, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(old)
        channel = await registry.open_channel(old, reactor)
        await registry.remove("M0")
        new = await registry.create("M0", None, lambda: FakeBdev("M0"))
        other = await registry.open_channel(new, reactor)
        assert other is not channel
        await registry.close_channel(channel)
        assert "bdev closed" in old.steps
        assert "bdev closed" not in new.steps

    run(test)


def test_removing_twice_and_what_is_not_there() -> None:
    async def test(registry: Any) -> None:
        registry.add(FakeBdev("M0"))
        with pytest.raises(NotFound):
            await registry.remove("M0", "malloc")
        results = await asyncio.gather(
            registry.remove("M0", "fake"), registry.remove("M0", "fake"), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), NotFound]
        with pytest.raises(NotFound) as caught:
            await registry.remove("M0")
        assert caught.value.errno == errno.ENODEV

    run(test)


def test_a_listener_that_fails_does_not_stop_the_removal(caplog: pytest.LogCaptureFixture) -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0")
        registry.add(bdev)

        def bad(about: FakeBdev, event: str) -> None:
            raise RuntimeError("broken")

        registry.subscribe(bdev, bad)
        await registry.remove("M0")
        assert bdev.steps == ["bdev closed"]

    run(test)
    assert "broken" in caplog.text


def test_growing_is_always_allowed_and_told() -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0", num_blocks=100)
        registry.add(bdev)
        told: list[tuple[str, int]] = []
        registry.subscribe(bdev, lambda about, event: told.append((event, about.num_blocks)))
        await registry.open_channel(bdev, FakeReactor())
        await registry.resize(bdev, 200)
        await registry.resize(bdev, 200)
        assert told == [("resize", 200)]

    run(test)


def test_shrinking_is_refused_while_somebody_uses_it() -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0", num_blocks=100)
        registry.add(bdev)
        channel = await registry.open_channel(bdev, FakeReactor())
        with pytest.raises(InUse) as caught:
            await registry.resize(bdev, 50)
        assert caught.value.errno == errno.EBUSY
        assert bdev.num_blocks == 100
        await registry.resize(bdev, 70, force=True)
        assert bdev.num_blocks == 70
        await registry.close_channel(channel)
        await registry.resize(bdev, 50)
        assert bdev.num_blocks == 50
        with pytest.raises(UsageError):
            await registry.resize(bdev, 0)

    run(test)


def test_a_claim_keeps_others_out_with_spdks_errno() -> None:
    async def test(registry: Any) -> None:
        bdev = FakeBdev("M0")
        registry.add(bdev)
        registry.claim(bdev, "the volume store 'lvs0'")
        for refused in (registry.require_unclaimed, lambda b: registry.claim(b, "another")):
            with pytest.raises(InUse, match="lvs0") as caught:
                refused(bdev)
            assert caught.value.errno == errno.EPERM
        assert registry.claims(bdev).holder == "the volume store 'lvs0'"
        registry.release(bdev, "the volume store 'lvs0'")
        registry.require_unclaimed(bdev)

    run(test)


def test_waiting_for_a_bdev_ends_when_it_comes_or_in_time() -> None:
    async def test(registry: Any) -> None:
        waiting = asyncio.create_task(registry.wait_for("M0", 10))
        await settle()
        registry.add(FakeBdev("M1"))
        await settle()
        assert not waiting.done()
        bdev = FakeBdev("M0")
        registry.add(bdev)
        assert await waiting is bdev
        with pytest.raises(TimeoutError):
            await registry.wait_for("M2", 0.01)

    run(test)


def test_events_are_told_in_order() -> None:
    async def test(registry: Any) -> None:
        events: list[tuple[str, str]] = []
        registry.on_event(lambda kind, name: events.append((kind, name)))
        bdev = FakeBdev("M0", uuid4())
        registry.add(bdev)
        await registry.resize(bdev, 200)
        await registry.remove("M0")
        assert events == [
            ("bdev_register", "M0"),
            ("bdev_resize", "M0"),
            ("bdev_unregister", "M0"),
        ]

    run(test)


def test_closing_removes_everything_newest_first() -> None:
    async def test(registry: Any) -> None:
        order: list[str] = []
        registry.on_event(
            lambda kind, name: order.append(name) if kind == "bdev_unregister" else None
        )
        for name in ("a", "b", "c"):
            registry.add(FakeBdev(name))
        await registry.close()
        assert order == ["c", "b", "a"]
        assert len(registry) == 0

    run(test)


def test_closing_waits_for_what_is_under_way() -> None:
    async def test(registry: Any) -> None:
        bdev, reactor = FakeBdev("M0"), FakeReactor()
        registry.add(bdev)
        channel = await registry.open_channel(bdev, reactor)
        bdev.gates["remove"].clear()
        removing = asyncio.create_task(registry.remove("M0"))
        await settle()
        closing = asyncio.create_task(registry.close())
        await settle()
        assert not closing.done()
        bdev.gates["remove"].set()
        await asyncio.gather(closing, removing)
        await registry.close_channel(channel)
        assert bdev.steps[-1] == "bdev closed"

    run(test)
