"""The disk that stands in for a removed one: an opening that failed is tried again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from drivebay.bdev.base import Channel
from drivebay.bdev.malloc import MallocBdev
from drivebay.errors import HostError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from drivebay.vhost import removed_disk
from drivebay.vhost.removed_disk import RemovedDisk


class PoorOnce(MallocBdev):
    """Its first channel does not open."""

    poor = True

    def open_channel(self, reactor: Reactor, *bases: Channel | None) -> Any:
        if self.poor:
            self.poor = False
            raise HostError("no memory for a channel", 12)
        return super().open_channel(reactor)


def test_an_opening_that_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removed_disk, "MallocBdev", PoorOnce)

    async def scenario() -> None:
        control = ControlMailbox()
        asyncio.get_running_loop().add_reader(control.fileno(), control.drain)
        reactor = Reactor(0, control)
        reactor.start()
        disk = RemovedDisk()
        with pytest.raises(HostError, match="no memory for a channel"):
            await disk.channel(reactor)
        channel = await disk.channel(reactor)
        assert disk.owns(channel)
        assert await disk.channel(reactor) is channel
        await disk.close()
        await reactor.stop()
        await asyncio.to_thread(reactor.join)
        reactor.close()
        asyncio.get_running_loop().remove_reader(control.fileno())

    asyncio.run(scenario())


def test_closing_after_an_opening_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removed_disk, "MallocBdev", PoorOnce)

    async def scenario() -> None:
        reactor = Reactor(0, ControlMailbox())
        disk = RemovedDisk()
        with pytest.raises(HostError):
            await disk.channel(reactor)
        await disk.close()
        reactor.close()

    asyncio.run(scenario())
