"""The machine of tests.fakes.stepped, moved by a real reactor thread. Context: tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import AsyncIterator, Callable

from drivebay.bdev.base import Bdev
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import EventPort
from tests.fakes.stepped import FEATURES, Machine

PATIENCE_S = 30.0


def some_core() -> int:
    """One of those that are ours."""
    return max(os.sched_getaffinity(0))


@contextlib.asynccontextmanager
async def running_reactor() -> AsyncIterator[Reactor]:
    """A reactor on its own thread, whose answers reach the running asyncio loop."""
    control = ControlMailbox()
    asyncio.get_running_loop().add_reader(control.fileno(), control.drain)
    reactor = Reactor(some_core(), control)
    reactor.start()
    try:
        yield reactor
    finally:
        await reactor.stop()
        await asyncio.to_thread(reactor.join)
        reactor.close()
        asyncio.get_running_loop().remove_reader(control.fileno())


class ThreadedMachine(Machine):
    """step() waits for what the reactor has to say, instead of moving it."""

    def __init__(
        self, bdev: Bdev | None = None, *, features: int = FEATURES, poll_us: int = 50
    ) -> None:
        self._running = False
        super().__init__(bdev, features=features, core=some_core(), poll_us=poll_us)

    def step(self, turns: int = 1) -> int:
        if not self._running:
            self._running = True
            self.reactor.start()
        for _ in range(turns):
            select.select([self.control.fileno()], [], [], 0.01)
            self.control.drain()
        return 0

    def make_port(self) -> EventPort:
        """Waits for the notification that the driver asked for."""
        return EventPort()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that the reactor brings about."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {PATIENCE_S} s: {what}")
            self.step()

    def end_reactor(self) -> None:
        self.settle(self.reactor.stop())
        self.reactor.join()
