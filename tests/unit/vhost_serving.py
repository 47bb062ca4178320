"""A controller that serves on a real socket, in a thread, over a fake data plane."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from drivebay.errors import NotFound
from drivebay.vhost import ring as ring_module
from drivebay.vhost.blk_controller import BlkController
from drivebay.vhost.controllers import Controllers
from tests.fakes.dataplane import FakeBdev, FakeChannel, FakePlane, FakeQueue, FakeReactor
from tests.fakes.front_end import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FrontEnd,
    HungUp,
    Protocol,
    Refused,
)
from tests.fakes.memory import GuestMemory

TIMEOUT_S = 20
VERSION_1 = 1 << 32
LOG_ALL = 1 << F_LOG_ALL
BIT_30 = 1 << F_PROTOCOL_FEATURES
FLUSH = 1 << 9
CONFIG_WCE = 1 << 11
ALL_PROTOCOL = sum(
    1 << bit
    for bit in (
        Protocol.MQ,
        Protocol.LOG_SHMFD,
        Protocol.REPLY_ACK,
        Protocol.BACKEND_REQ,
        Protocol.CONFIG,
        Protocol.RESET_DEVICE,
        Protocol.CONFIGURE_MEM_SLOTS,
        Protocol.STATUS,
    )
)
RING_SIZE = 64


class FakeRegistry:
    """Bdevs by name, and who holds a channel."""

    def __init__(self, *bdevs: FakeBdev) -> None:
        self.bdevs = {bdev.name: bdev for bdev in bdevs}
        self.channels: list[FakeChannel] = []
        self.listeners: list[Callable[[FakeBdev, str], Any]] = []

    def get(self, name: str) -> FakeBdev:
        if name not in self.bdevs:
            raise NotFound(f"no bdev '{name}'")
        return self.bdevs[name]

    def require_unclaimed(self, bdev: FakeBdev) -> None:
        pass

    async def open_channel(self, bdev: FakeBdev, reactor: FakeReactor) -> FakeChannel:
        self.channels.append(FakeChannel(bdev, reactor))
        return self.channels[-1]

    async def close_channel(self, channel: FakeChannel) -> None:
        self.channels.remove(channel)

    def subscribe(self, bdev: FakeBdev, listener: Callable[[FakeBdev, str], Any]) -> None:
        self.listeners.append(listener)

    def unsubscribe(self, bdev: FakeBdev, listener: Callable[[FakeBdev, str], Any]) -> None:
        self.listeners.remove(listener)


class Serving:
    """Controllers on a loop in a thread of its own, over a FakePlane."""

    def __init__(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, *bdevs: FakeBdev, cores: int = 1
    ) -> None:
        self.plane = FakePlane()
        self.directory = directory
        monkeypatch.setattr(ring_module, "BlkQueue", functools.partial(FakeQueue, self.plane))
        self.registry = FakeRegistry(*(bdevs or (FakeBdev(),)))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        reactors: list[Any] = [FakeReactor(core) for core in range(cores)]
        registry: Any = self.registry
        self.controllers = Controllers(directory, reactors, registry)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call(self.plane.release)
        self.run(self.controllers.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def inside() -> Any:
            return function(*arguments)

        return self.run(inside())

    def create(self, name: str = "vhost.0", dev_name: str = "Fake0", **more: Any) -> BlkController:
        controller: BlkController = self.run(self.controllers.create_blk(name, dev_name, **more))
        return controller

    def connect(self, name: str = "vhost.0") -> FrontEnd:
        return FrontEnd(self.directory / name)

    def connect_to(self, controller: BlkController) -> FrontEnd:
        return self.connect(controller.name)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until something is true in the loop's thread."""

        async def watch() -> None:
            async with asyncio.timeout(TIMEOUT_S):
                while not condition():
                    await asyncio.sleep(0.005)

        self.run(watch())

    def until_empty(self) -> None:
        """Wait until every session is gone, drained and released."""
        self.until(lambda: not any(controller.sessions for controller in self.controllers))


def negotiate(front: FrontEnd, features: int = 0, protocol: int = ALL_PROTOCOL) -> None:
    """What every front end says first."""
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(protocol)
    front.set_owner()
    front.set_features(features | VERSION_1 | BIT_30)


def start_ring(
    front: FrontEnd, memory: GuestMemory, index: int = 0, *, enable: bool = True, base: int = 0
) -> tuple[int, int]:
    """Set up one ring as QEMU does; returns its kick and call eventfds, the caller's to close."""
    where = [
        memory.allocate(size, 4096, one_region=True)
        for size in (RING_SIZE * 16, RING_SIZE * 2 + 6, RING_SIZE * 8 + 6)
    ]
    desc, avail, used = (memory.user_addr(address) for address in where)
    kick, call = os.eventfd(0), os.eventfd(0)
    try:
        front.set_vring_num(index, RING_SIZE)
        front.set_vring_base(index, base)
        front.set_vring_addr(index, desc, avail, used)
        front.set_vring_kick(index, kick)
        front.set_vring_call(index, call)
        if enable:
            front.set_vring_enable(index)
    except (Refused, HungUp):
        os.close(kick)
        os.close(call)
        raise
    return kick, call
