"""The small parts of a target: its watchdog, its memory's bound, its events, its settings."""

from __future__ import annotations

import doctest
import errno
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from drivebay.errors import HostError
from drivebay.target import budget, notifications, settings
from drivebay.target.budget import MemoryBudget
from drivebay.target.notifications import KEPT, Notifications
from drivebay.target.settings import Settings
from drivebay.target.watchdog import LOGGED_AFTER, NOTIFYING, PERIOD_S, Watchdog


class FakeReactor:
    """A reactor whose counters a test sets."""

    def __init__(self) -> None:
        self.loops = 0
        self.sleeping = False
        self.place = "flush of uring"
        self.rescues = 0

    def stats(self) -> Any:
        return SimpleNamespace(
            core=1, tid=77, loops=self.loops, sleeping=self.sleeping, place=self.place
        )

    def rescue(self) -> bool:
        self.rescues += 1
        return True


def test_examples_in_the_documentation() -> None:
    for module in (budget, notifications, settings):
        assert doctest.testmod(module).failed == 0


def test_a_standstill_is_said_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reactor: Any = FakeReactor()
    watchdog = Watchdog([reactor])
    for _ in range(3):
        reactor.loops += 1
        watchdog.check()
    for _ in range(LOGGED_AFTER - 1):
        watchdog.check()
    assert not caplog.records
    watchdog.check()
    watchdog.check()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    for part in ("core 1", "thread 77", "'flush of uring'"):
        assert part in caplog.text
    reactor.loops += 1
    for _ in range(LOGGED_AFTER + 1):
        watchdog.check()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "ERROR"]
    assert reactor.rescues == 0


def test_a_reactor_stuck_in_a_notification_is_freed_at_once() -> None:
    reactor: Any = FakeReactor()
    watchdog = Watchdog([reactor])
    watchdog.check()
    reactor.place = NOTIFYING
    watchdog.check()
    assert reactor.rescues == 1
    [found] = watchdog.history
    assert found.rescued
    assert not found.over


def test_standstills_are_remembered() -> None:
    reactor: Any = FakeReactor()
    watchdog = Watchdog([reactor])
    for _ in range(LOGGED_AFTER):
        watchdog.check()
    assert not watchdog.history, "what is short is no news"
    watchdog.check()
    reactor.place = "submit to null"
    watchdog.check()
    [found] = watchdog.history
    assert (found.core, found.tid, found.place) == (1, 77, "submit to null")
    assert found.seconds == (LOGGED_AFTER + 1) * PERIOD_S
    assert not found.over
    reactor.loops += 1
    watchdog.check()
    assert found.over
    for _ in range(LOGGED_AFTER):
        watchdog.check()
    assert [entry.over for entry in watchdog.history] == [True, False]


def test_a_sleeping_reactor_does_not_stand_still(caplog: pytest.LogCaptureFixture) -> None:
    reactor: Any = FakeReactor()
    reactor.sleeping = True
    watchdog = Watchdog([reactor])
    for _ in range(3):
        watchdog.check()
    assert not caplog.records


def test_memory_is_promised_up_to_the_bound() -> None:
    memory = MemoryBudget(4)
    memory.reserve(3 << 20)
    with pytest.raises(HostError, match="-s 4") as caught:
        memory.reserve(2 << 20)
    assert caught.value.errno == errno.ENOMEM
    memory.release(3 << 20)
    memory.reserve(4 << 20)
    assert memory.free == 0


def test_without_a_bound_the_machines_memory_is_one() -> None:
    with pytest.raises(HostError, match="the memory of this machine"):
        MemoryBudget(0).reserve(1 << 50)


def test_only_the_last_events_are_kept_and_ids_go_on() -> None:
    events = Notifications()
    for number in range(KEPT + 10):
        events.add("bdev_register", f"M{number}")
    found = events.since(0, 3)
    assert [event["id"] for event in found] == [10, 11, 12]
    assert events.since(KEPT + 9, 100) == [
        {"type": "bdev_register", "ctx": f"M{KEPT + 9}", "id": KEPT + 9}
    ]
    assert events.since(1 << 60, 100) == []
    assert events.since(0, 0) == []


def test_what_is_set_is_kept_beside_what_was_there() -> None:
    kept = Settings()
    kept.merge("bdev_nvme_set_hotplug", {"enable": False, "period_us": None})
    kept.merge("bdev_set_options", {"bdev_io_pool_size": 100_000})
    calls = kept.calls("bdev")
    assert [call["method"] for call in calls] == [
        "bdev_set_options",
        "bdev_raid_set_options",
        "bdev_nvme_set_hotplug",
    ]
    assert calls[0]["params"]["bdev_io_pool_size"] == 100_000
    assert calls[0]["params"]["bdev_io_cache_size"] == 256
    assert calls[2]["params"] == {"enable": False}
    assert kept.calls("vhost_blk") == []
