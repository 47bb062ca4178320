"""All vhost controllers of this process: making, finding and deleting them.

Context: control.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from drivebay.bdev.base import Bdev
from drivebay.errors import AlreadyExists, HostError, NotFound, UsageError
from drivebay.reactor.clock import tick_rate
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.blk_controller import TRANSPORT, BdevSource, BlkController, SessionNumbers
from drivebay.vhost.cpumask import parse_cpumask
from drivebay.vhost.handlers import SERIAL_BYTES
from drivebay.vhost.listening_socket import ListeningSocket
from drivebay.vhost.removed_disk import RemovedDisk
from drivebay.vhost.ring import Coalescing

__all__ = ["APP_THREAD_ID", "Controllers"]

_log = logging.getLogger(__name__)

APP_THREAD_ID: Final = 1  # controllers are the threads that follow
LEAST_IOPS: Final = 100  # the rate is looked at 100 times a second
MAX_DELAY_TICKS: Final = (1 << 32) - 1
DEFAULT_SOCKET_MODE: Final = 0o600
MAX_NAME_BYTES: Final = 255
LETTING_GO_S: Final = 1.0  # who asks next for the file of a deleted disk shall find it free


class Registry(BdevSource, Protocol):
    """The bdev registry, as far as controllers need it."""

    def get(self, name: str) -> Bdev:
        """Raises: NotFound."""

    def require_unclaimed(self, bdev: Bdev) -> None:
        """Raises: InUse, with errno EPERM."""


class Controllers:
    """The controllers by name, in the order in which they were made."""

    def __init__(
        self,
        directory: Path,
        reactors: Sequence[Reactor],
        registry: Registry,
        *,
        socket_mode: int | None = None,
        socket_group: str | None = None,
    ) -> None:
        """``directory`` is where the sockets are made. Raises: UsageError."""
        self._directory = directory
        self._reactors = tuple(reactors)
        self._registry = registry
        self._mode = DEFAULT_SOCKET_MODE if socket_mode is None else socket_mode
        self._group = _group_id(socket_group) if socket_group is not None else None
        self._controllers: dict[str, BlkController] = {}
        self._numbers = SessionNumbers()
        self._removed = RemovedDisk()
        self._draining: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._last_thread_id = APP_THREAD_ID

    def __iter__(self) -> Iterator[BlkController]:
        return iter(list(self._controllers.values()))

    def get(self, name: str) -> BlkController:
        """Raises: NotFound."""
        controller = self._controllers.get(name)
        if controller is None:
            raise NotFound(
                f"no vhost controller is called '{name[:MAX_NAME_BYTES]}'",
                hint="vhost_get_controllers lists them",
            )
        return controller

    async def create_blk(
        self,
        name: str,
        dev_name: str,
        *,
        cpumask: str | None = None,
        readonly: bool = False,
        packed_ring: bool = False,
        transport: str | None = None,
        socket_uid: int | None = None,
        serial: str | None = None,
    ) -> BlkController:
        """Offer a bdev on a socket of that name, to the user ``socket_uid`` alone if one is named.

        ``serial`` is the number that guests see instead of the bdev's name.
        Checked in SPDK's order, so that a request with two faults gets its answer.
        Raises: UsageError, NotFound, InUse, AlreadyExists, HostError.
        """
        if transport not in (None, TRANSPORT):
            raise UsageError(
                f"no transport is called '{transport}'", field="transport", hint=f"use {TRANSPORT}"
            )
        bdev = self._registry.get(dev_name)
        self._registry.require_unclaimed(bdev)
        if serial is not None:
            _check_serial(serial)
        mask, reactors = self._choose_reactors(cpumask)
        _check_name(name)
        if name in self._controllers:
            raise AlreadyExists(f"a vhost controller is called '{name}' already")
        listening = ListeningSocket(self._directory / name, self._mode, self._group, socket_uid)
        controller = BlkController(
            name,
            bdev,
            readonly=readonly,
            packed_ring=packed_ring,
            socket_uid=socket_uid,
            serial=serial,
            cpumask=mask,
            thread_id=self._last_thread_id + 1,
            reactors=reactors,
            listening=listening,
            source=self._registry,
            removed=self._removed,
            numbers=self._numbers,
        )
        self._controllers[name] = controller
        self._turn += 1
        self._last_thread_id += 1
        _log.info("controller '%s' serves bdev '%s' at %s", name, bdev.name, listening.path)
        return controller

    def _choose_reactors(self, cpumask: str | None) -> tuple[int, list[Reactor]]:
        """The mask, and its reactors beginning with the one whose turn it is."""
        ours = 0
        for reactor in self._reactors:
            ours |= 1 << reactor.core
        mask = ours if cpumask is None else parse_cpumask(cpumask)
        if mask & ~ours:
            raise UsageError(
                f"cpumask {mask:#x} has cores on which no reactor runs (those with one: {ours:#x})",
                field="cpumask",
                hint="start the target with these cores in -m",
            )
        return mask, self._in_turn(mask)

    def _in_turn(self, mask: int) -> list[Reactor]:
        chosen = [reactor for reactor in self._reactors if mask >> reactor.core & 1]
        turn = self._turn % len(chosen)
        return chosen[turn:] + chosen[:turn]

    async def move(self, controller: BlkController, mask: int) -> None:
        """Serve a controller on the reactors of this mask, while I/O runs.

        Cores without a reactor do not count. Raises: UsageError when no core is left.
        """
        ours = sum(1 << reactor.core for reactor in self._reactors)
        if not mask & ours:
            raise UsageError(
                f"cpumask {mask:#x} has no core with a reactor (those with one: {ours:#x})",
                field="cpumask",
            )
        await controller.move(mask & ours, self._in_turn(mask & ours))
        self._turn += 1
        _log.info("controller '%s' is served on cores %#x now", controller.name, mask & ours)

    async def set_coalescing(self, name: str, coalescing: Coalescing) -> None:
        """Raises: NotFound, UsageError."""
        controller = self.get(name)
        if coalescing.iops_threshold < LEAST_IOPS:
            raise UsageError(
                f"iops_threshold is {coalescing.iops_threshold} (at least {LEAST_IOPS})",
                field="iops_threshold",
            )
        if coalescing.delay_base_us * tick_rate() // 1_000_000 >= MAX_DELAY_TICKS:
            most = MAX_DELAY_TICKS * 1_000_000 // tick_rate()
            raise UsageError(
                f"delay_base_us is {coalescing.delay_base_us} (less than {most} here)",
                field="delay_base_us",
            )
        await controller.set_coalescing(coalescing)

    async def delete(self, name: str, *, force: bool = False) -> None:
        """Remove a controller and its socket. Raises: NotFound, InUse while one is connected.

        ``force`` ends its sessions. Returns when the disk has no user left; where requests
        take longer than LETTING_GO_S, they drain afterwards.
        """
        controller = self.get(name)
        if not force:
            controller.refuse_if_connected()
        sessions = list(controller.sessions.values())
        await self._end(controller)
        if sessions:
            await asyncio.wait(sessions, timeout=LETTING_GO_S)

    async def _end(self, controller: BlkController) -> None:
        del self._controllers[controller.name]
        await controller.close(self._keep_until_drained)

    def _keep_until_drained(self, task: asyncio.Task[None]) -> None:
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def close(self, patience_s: float | None = None) -> bool:
        """End everything, and wait until nothing is in flight any more, or ``patience_s``.

        Returns whether all is over. If not, guest memory is still mapped and must stay so.
        """
        for controller in self:
            await self._end(controller)
        if self._draining:
            await asyncio.wait(list(self._draining), timeout=patience_s)
        if self._draining:
            return False
        await self._removed.close()
        return True


def _check_serial(serial: str) -> None:
    """Guests make a file name of it (/dev/disk/by-id). Raises: UsageError."""
    if not re.fullmatch(rf"[!-~]{{1,{SERIAL_BYTES}}}", serial):
        raise UsageError(
            f"'{serial[:80]}' is no serial number: 1 to {SERIAL_BYTES} printable ASCII characters "
            "without a space",
            field="serial",
        )


def _check_name(name: str) -> None:
    if not name or "\0" in name:
        raise UsageError("a vhost controller's name is empty or has a zero byte", field="ctrlr")
    if "/" in name or name in (".", ".."):
        raise HostError(
            f"vhost controller '{name[:MAX_NAME_BYTES]}' would have its socket in another folder",
            errno.EIO,
        )


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"no group is called '{name}'", field="socket_group", hint="see /etc/group"
        ) from None
