"""The object graph of one target process, and the order in which it starts and stops.

Context: control. Start: mailbox, reactors, registry, controllers; then *startup*, where
only settings may be changed, until ``start_runtime``; then *runtime*, where disks and
controllers come and go. Stop is the same backwards: controllers end their sessions,
bdevs close, reactors end. Each step waits for the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drivebay.bdev.base import Bdev
from drivebay.bdev.keyring import Keyring
from drivebay.bdev.lvol.shallow_copy import ShallowCopies
from drivebay.bdev.raid.arrays import Arrays
from drivebay.bdev.registry import BdevRegistry
from drivebay.bdev.wishes import Wishes
from drivebay.errors import HostError, StateError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from drivebay.target.budget import MemoryBudget
from drivebay.target.notifications import Notifications
from drivebay.target.options import Options
from drivebay.target.settings import Settings
from drivebay.target.stores import TargetStores
from drivebay.target.watchdog import Watchdog
from drivebay.vhost.controllers import Controllers

__all__ = ["Target"]

_log = logging.getLogger(__name__)

# Opening a file, mapping memory and fsync wait here; a handful can wait at the same time.
_WORKERS = 8
# How long the end waits for requests in flight: less than `target stop` waits for the end.
END_PATIENCE_S = 45.0


class Target:
    """Everything a running target is made of."""

    registry: BdevRegistry
    controllers: Controllers

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = "startup"
        self.started_at = time.monotonic()
        self.registry = BdevRegistry()
        self.wishes = Wishes(self.registry)
        self.notifications = Notifications()
        self.memory = MemoryBudget(options.memory_mb)
        self.settings = Settings()
        self.keyring = Keyring()
        self.unloaded: list[Any] = []  # entries of the configuration that failed to load
        self.reactors: list[Reactor] = []
        self.stores = TargetStores(self.registry, self._first_reactor)
        self.copies = ShallowCopies(self.registry, self._first_reactor)
        self.rpc_methods: Mapping[str, Any] = {}  # what its RPC server answers
        self._kept: dict[str, tuple[Bdev, dict[str, int]]] = {}
        self._running = asyncio.Event()
        self._initialised = asyncio.Event()
        self.watchdog = Watchdog(self.reactors)
        self._watching: asyncio.Task[None] | None = None
        self._mailbox: ControlMailbox | None = None
        self._workers: ThreadPoolExecutor | None = None
        self.registry.examining.by_hand = self.settings.examined
        self.arrays = Arrays(self.registry, self._first_reactor, self._raid_options)
        self.registry.on_event(self.notifications.add)
        self.registry.examining.on_examine(self._examine_gpt, _may_be_partitioned)
        self.registry.examining.reactor = self._first_reactor

    async def start(self) -> None:
        """Bring up reactors and what stands on them. Raises: DrivebayError; stop() then."""
        loop = asyncio.get_running_loop()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="worker")
        loop.set_default_executor(self._workers)
        self._mailbox = ControlMailbox()
        loop.add_reader(self._mailbox.fileno(), self._mailbox.drain)
        for core in self.options.cores:
            self._start_reactor(core, self._mailbox)
        directory = Path(self.options.socket_dir)
        self.controllers = Controllers(
            directory,
            self.reactors,
            self.registry,
            socket_mode=self.options.socket_mode,
            socket_group=self.options.socket_group,
        )
        self._watching = asyncio.create_task(self.watchdog.run())

    def _start_reactor(self, core: int, mailbox: ControlMailbox) -> None:
        poll_us = self.options.poll_us
        reactor = Reactor(core, mailbox) if poll_us is None else Reactor(core, mailbox, poll_us)
        try:
            with _allowed_on(core):
                reactor.start()
        except BaseException:
            reactor.close()
            raise
        self.reactors.append(reactor)

    async def _examine_gpt(self, bdev: Bdev) -> None:
        from drivebay.bdev.gpt import examine_gpt  # on a compiled module; the first bdev needs it

        await examine_gpt(self.registry, self.reactors[0], bdev)

    def _first_reactor(self) -> Reactor:
        """It owns stores and RAID arrays, and control's own I/O goes through it."""
        return self.reactors[0]

    def start_runtime(self) -> None:
        """Leave the startup state. Raises: StateError when it was left before."""
        if self.state != "startup":
            raise StateError("the target is initialised already")
        self.state = "runtime"
        self._running.set()

    async def wait_runtime(self) -> None:
        """Wait until somebody calls start_runtime()."""
        await self._running.wait()

    def finish_init(self) -> None:
        """The configuration is loaded: whoever waits for it may go on."""
        self._initialised.set()

    @property
    def loading(self) -> bool:
        """Whether the configuration is not loaded yet."""
        return not self._initialised.is_set()

    async def wait_init(self) -> None:
        """Wait until the target is initialised and its configuration loaded."""
        await self._initialised.wait()

    async def stop(self) -> None:
        """End everything that start() began, as far as it came.

        A bdev that does not answer is not waited for without limit: its requests, and the
        memory that they go to, are then left to the kernel, which ends them with the process.
        """
        drained = not hasattr(self, "controllers") or await self.controllers.close(END_PATIENCE_S)
        if drained:
            await self.stores.close()
            await self.registry.close()
        else:
            _log.error(
                "requests are in flight for more than %d s: the target ends without their answers",
                END_PATIENCE_S,
            )
        # Not before: while sessions end, a guest can still hold a reactor up.
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        for reactor in self.reactors:
            await reactor.stop()
            await asyncio.to_thread(reactor.join)
            reactor.close()
        self.reactors.clear()
        if self._mailbox is not None:
            asyncio.get_running_loop().remove_reader(self._mailbox.fileno())
            self._mailbox = None
        if self._workers is not None:
            self._workers.shutdown(wait=False)
            self._workers = None

    def _raid_options(self) -> tuple[int, int]:
        options = self.settings.get("bdev_raid_set_options")
        return options["process_window_size_kb"], options["process_max_bandwidth_mb_sec"]

    def keep_parameters(self, bdev: Bdev, parameters: dict[str, int]) -> None:
        """Remember what a bdev was made with and does not keep itself."""
        if parameters:
            self._kept[bdev.name] = (bdev, parameters)

    def kept_parameters(self, bdev: Bdev) -> dict[str, int]:
        """What keep_parameters() was given for this very bdev."""
        kept, parameters = self._kept.get(bdev.name, (None, {}))
        return parameters if kept is bdev else {}

    def malloc_name(self) -> str:
        """A name for a malloc bdev that was not given one: the first free of Malloc0, Malloc1 …"""
        number = 0
        while not self.registry.is_free(f"Malloc{number}"):
            number += 1
        return f"Malloc{number}"


def _may_be_partitioned(head: bytes) -> bool:
    from drivebay.wire.gpt import is_protective_mbr

    return is_protective_mbr(head)


@contextlib.contextmanager
def _allowed_on(core: int) -> Iterator[None]:
    """Let this thread start one on a core that it keeps off itself."""
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, own | {core})
    except OSError as error:
        what = f"can't run a reactor on core {core}"
        raise HostError(what, error.errno or errno.EINVAL, hint="name other cores in -m") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
