"""The target's own parts on a loop in a thread, with one malloc disk: all but the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.memory.guest_memory import install_sigbus_handler, mapped_regions
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.controllers import Controllers
from tests.fakes.descriptors import held_fds, more_fds_than
from tests.fakes.memory import MIB

TIMEOUT_S = 30
SECTORS = 4 * MIB // 512


class Target:
    """Reactors, a registry and controllers on a loop of their own, as in the real process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self._start())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    async def _start(self) -> None:
        self.mailbox = ControlMailbox()
        self.loop.add_reader(self.mailbox.fileno(), self.mailbox.drain)
        cores = sorted(os.sched_getaffinity(0))[:2]
        self.reactors = [Reactor(core, self.mailbox) for core in cores]
        for reactor in self.reactors:
            reactor.start()
        self.registry = BdevRegistry()
        self.controllers = Controllers(self.directory, self.reactors, self.registry)
        await self.registry.create("M0", None, lambda: MallocBdev("M0", None, 512, SECTORS))
        await self.controllers.create_blk("vhost.0", "M0")

    async def _stop(self) -> None:
        await self.controllers.close()
        await self.registry.close()
        for reactor in self.reactors:
            await reactor.stop()
            await asyncio.to_thread(reactor.join)
            reactor.close()
        self.loop.remove_reader(self.mailbox.fileno())
        await self.loop.shutdown_default_executor()

    def stop(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        # The fixture's value lives on for a while; the mailbox's descriptor shall not.
        del self.mailbox, self.reactors, self.registry, self.controllers

    def until_empty(self) -> None:
        async def watch() -> None:
            async with asyncio.timeout(TIMEOUT_S):
                while any(controller.sessions for controller in self.controllers):
                    await asyncio.sleep(0.005)

        self.run(watch())

    @property
    def socket(self) -> Path:
        return self.directory / "vhost.0"

    async def describe(self) -> dict[str, Any]:
        return self.controllers.get("vhost.0").describe()


@contextmanager
def serving_target(folder: Path) -> Iterator[Target]:
    """A target whose end leaves nothing behind, which is checked."""
    install_sigbus_handler()
    before = held_fds()
    running = Target(folder)
    yield running
    running.stop()
    assert mapped_regions() == 0
    assert not more_fds_than(before)
    assert list(folder.iterdir()) == []
