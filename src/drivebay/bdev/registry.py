"""All bdevs of this process: their names, who holds them, and their end.

Context: control (the asyncio thread); only constructors, open_channel and close of a
bdev run in worker threads. Nothing here may block the loop.

A bdev's life: *building* (the name is reserved, a worker thread constructs it), *live*,
*removed* (the name is free again, its users were told, its channels refuse I/O), *closed*
(the last user let go of its channel). ``remove`` answers at *removed*: a guest that stays
connected for days must not hold up an RPC client.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from drivebay.bdev.channels import BdevChannels
from drivebay.bdev.claims import EXCLUSIVE, Claims, refusal
from drivebay.bdev.examining import Examining
from drivebay.errors import AlreadyExists, InUse, NotFound, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.access import Access
    from drivebay.bdev.base import Bdev, Channel, Listener
    from drivebay.reactor.reactor import Reactor

__all__ = ["BdevRegistry"]

_log = logging.getLogger(__name__)

SLOW_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class _Entry:
    bdev: Bdev
    channels: BdevChannels
    on_closed: Callable[[], None] | None = None
    listeners: list[Listener] = field(default_factory=list)
    claims: Claims = field(default_factory=Claims)
    log_level: int = logging.INFO  # of its coming and going
    removed: bool = False
    closed: bool = False


class BdevRegistry:
    """Every bdev by name, alias and uuid, in the order of creation."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._by_alias: dict[str, _Entry] = {}
        self._by_uuid: dict[str, _Entry] = {}
        self._held: dict[Bdev, _Entry] = {}  # all until they are closed
        self._leaving: list[_Entry] = []  # removed, but not yet let go of
        self._reserved: dict[str, UUID | None] = {}
        self._arrived = asyncio.Condition()
        self._announcing = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._notify: list[Callable[[str, str], None]] = []
        self.examining = Examining(self)

    def on_event(self, notify: Callable[[str, str], None]) -> None:
        """Call ``notify(type, name)`` for bdev_register, bdev_unregister and bdev_resize."""
        self._notify.append(notify)

    def __iter__(self) -> Iterator[Bdev]:
        return iter([entry.bdev for entry in self._entries.values()])

    def __contains__(self, bdev: Bdev) -> bool:
        entry = self._entries.get(bdev.name)
        return entry is not None and entry.bdev is bdev

    def __len__(self) -> int:
        return len(self._entries)

    # Names

    async def create(
        self,
        name: str,
        uuid: UUID | None,
        build: Callable[[], Bdev],
        on_closed: Callable[[], None] | None = None,
    ) -> Bdev:
        """Reserve the name, build the bdev in a worker thread, make it known.

        Goes on when the caller is cancelled: what was begun is finished, not leaked.
        Raises: UsageError, AlreadyExists, and whatever ``build`` raises; ``on_closed``
        is called in that case too.
        """
        try:
            self._check_free(name, uuid)
        except (UsageError, AlreadyExists):
            _call(on_closed)
            raise
        self._reserved[name] = uuid
        return await asyncio.shield(self.spawn(self._build(name, build, on_closed)))

    async def _build(
        self, name: str, build: Callable[[], Bdev], on_closed: Callable[[], None] | None
    ) -> Bdev:
        built = False
        try:
            bdev = await asyncio.to_thread(build)
            built = True
        finally:
            del self._reserved[name]
            if not built:
                _call(on_closed)
        self._insert(bdev, on_closed)
        await self.examining.arrive(bdev)
        return bdev

    def add(self, bdev: Bdev, on_closed: Callable[[], None] | None = None) -> None:
        """Make a finished bdev known; it is looked into soon. Raises: UsageError, AlreadyExists.

        For those that come by the thousand: the log tells of them only in its details.
        """
        self._check_free(bdev.name, bdev.uuid)
        self._insert(bdev, on_closed, logging.DEBUG)
        self.examining.arrive_soon(bdev)

    def _insert(
        self, bdev: Bdev, on_closed: Callable[[], None] | None, log_level: int = logging.INFO
    ) -> None:
        entry = _Entry(bdev, BdevChannels(bdev, self), on_closed, log_level=log_level)
        self._entries[bdev.name] = self._held[bdev] = self._by_uuid[str(bdev.uuid)] = entry
        self._by_alias |= dict.fromkeys(bdev.aliases, entry)
        _log.log(
            log_level,
            "bdev '%s' is here: %s, %d blocks of %d bytes",
            bdev.name,
            bdev.product_name,
            bdev.num_blocks,
            bdev.block_size,
        )
        self._tell("bdev_register", bdev.name)
        if not self._announcing:
            self._announcing = True
            self.spawn(self._announce())

    async def _announce(self) -> None:
        """For all that came in this turn of the loop."""
        self._announcing = False
        async with self._arrived:
            self._arrived.notify_all()

    def _check_free(self, name: str, uuid: UUID | None) -> None:
        if not name:
            raise UsageError("a bdev needs a name", field="name")
        if not self.is_free(name):
            raise AlreadyExists(f"a bdev called '{name[:80]}' exists already")
        if uuid is None:
            return
        if uuid in self._reserved.values() or self._find(str(uuid)) is not None:
            raise AlreadyExists(f"a bdev with uuid {uuid} exists already")

    def _find(self, name: str) -> _Entry | None:
        return (
            self._entries.get(name) or self._by_alias.get(name) or self._by_uuid.get(name.lower())
        )

    def set_aliases(self, bdev: Bdev, aliases: list[str]) -> None:
        """Give it these further names instead. Raises: AlreadyExists, StateError when removed."""
        entry = self._entry_of(bdev)
        for alias in aliases:
            if self._find(alias) not in (None, entry):
                raise AlreadyExists(f"a bdev called '{alias[:80]}' exists already")
        self._forget_aliases(entry)
        bdev.aliases = list(aliases)
        self._by_alias |= dict.fromkeys(aliases, entry)

    def _forget_aliases(self, entry: _Entry) -> None:
        for alias in entry.bdev.aliases:
            self._by_alias.pop(alias, None)

    def get(self, name: str) -> Bdev:
        """Return a bdev by name, alias or uuid. Raises: NotFound."""
        entry = self._find(name)
        if entry is None:
            raise NotFound(f"no bdev is called '{name[:80]}'", hint="list them with bdev_get_bdevs")
        return entry.bdev

    def is_free(self, name: str) -> bool:
        """Whether no bdev has the name, or is being built under it."""
        return name not in self._reserved and self._find(name) is None

    def get_of_module(self, name: str, module: str) -> Bdev:
        """As get(), for a bdev of one module only. Raises: NotFound."""
        entry = self._find(name)
        if entry is None or entry.bdev.module != module:
            raise NotFound(f"no {module} bdev is called '{name[:80]}'", hint="see bdev_get_bdevs")
        return entry.bdev

    async def wait_for(self, name: str, timeout_s: float) -> Bdev:
        """Return a bdev that may still be on its way. Raises: TimeoutError."""
        async with asyncio.timeout(timeout_s), self._arrived:
            while (entry := self._find(name)) is None:
                await self._arrived.wait()
        return entry.bdev

    def _entry_of(self, bdev: Bdev) -> _Entry:
        entry = self._entries.get(bdev.name)
        if entry is not None and entry.bdev is bdev:
            return entry
        raise StateError(f"bdev '{bdev.name}' is being removed")

    # Holders

    def subscribe(self, bdev: Bdev, listener: Listener) -> None:
        """Call ``listener(bdev, "resize" | "remove")`` and await what it returns.

        Raises: StateError when the bdev is being removed.
        """
        self._entry_of(bdev).listeners.append(listener)

    def unsubscribe(self, bdev: Bdev, listener: Listener) -> None:
        """Stop calling it; harmless when it is not subscribed (any more)."""
        entry = self._held.get(bdev)
        if entry is not None and listener in entry.listeners:
            entry.listeners.remove(listener)

    def claim(self, bdev: Bdev, by: str, kind: str = EXCLUSIVE) -> None:
        """Take it for one user. Raises: InUse (errno EPERM) when somebody has it."""
        entry = self._entry_of(bdev)
        if entry.claims.kind is None and entry.listeners:
            raise refusal(bdev.name, "is in use")
        entry.claims.take(bdev.name, by, kind)

    def release(self, bdev: Bdev, by: str) -> None:
        """Give a claim back; harmless when there is none."""
        entry = self._held.get(bdev)
        if entry is not None:
            entry.claims.release(by)

    def claims(self, bdev: Bdev) -> Claims:
        """Who has claimed it; nobody has one that is removed."""
        entry = self._entries.get(bdev.name)
        return entry.claims if entry is not None and entry.bdev is bdev else Claims()

    def require_unclaimed(self, bdev: Bdev) -> None:
        """Raises: InUse with errno EPERM, SPDK's answer, when somebody claimed it."""
        holder = self.claims(bdev).holder
        if holder is not None:
            raise refusal(bdev.name, f"is claimed by {holder}")

    def channels(self, bdev: Bdev) -> list[Channel]:
        """The channels that are open now."""
        entry = self._entries.get(bdev.name)
        return entry.channels.open_ones() if entry is not None and entry.bdev is bdev else []

    async def open_channel(self, bdev: Bdev, reactor: Reactor) -> Channel:
        """Return the one channel of (bdev, reactor), opening it for its first user.

        Raises: StateError when the bdev is being removed, HostError when it can't open.
        """
        return await self._entry_of(bdev).channels.open(reactor)

    async def close_channel(self, channel: Channel) -> None:
        """Let go of it; the last user's call returns when the reactor has too.

        Raises: StateError for a channel that is not open.
        """
        entry = self._held.get(channel.bdev)
        if entry is not None and entry.channels.has(channel):
            await entry.channels.close(channel)
            return
        raise StateError(f"this channel of bdev '{channel.bdev.name}' is not open")

    async def replace_base(self, bdev: Bdev, index: int, base: Bdev | None) -> None:
        """Have every channel use another base, or none; returns when the old one is let go.

        Raises: StateError, HostError when a channel of the new one can't open: the bdev then
        has no base there.
        """
        await self._entry_of(bdev).channels.replace_base(index, base)

    def quiesced(self, bdev: Bdev) -> AbstractAsyncContextManager[None]:
        """Hold new I/O of all its channels back, and have none in flight meanwhile."""
        return self._entry_of(bdev).channels.quiesced()

    @contextlib.asynccontextmanager
    async def access(self, bdev: Bdev, reactor: Reactor) -> AsyncIterator[Access]:
        """Read and write it from control. Raises: StateError, HostError."""
        from drivebay.bdev.access import Access  # compiled; loaded when first needed

        channel = await self.open_channel(bdev, reactor)
        try:
            yield Access(channel)
        finally:
            await self.close_channel(channel)

    # The end, and changes of size

    async def remove(self, name: str, module: str | None = None) -> None:
        """Hot remove: tell the users, fail I/O, free the name.

        Returns when no I/O is in flight any more; the bdev closes when its last user has
        let go. Goes on when the caller is cancelled. Raises: NotFound, also for a bdev of
        another ``module``.
        """
        bdev = self.get(name) if module is None else self.get_of_module(name, module)
        entry = self._entry_of(bdev)
        del self._entries[entry.bdev.name]
        self._by_uuid.pop(str(entry.bdev.uuid), None)
        self._forget_aliases(entry)
        self._leaving.append(entry)
        entry.removed = True
        entry.channels.removed = True
        await asyncio.shield(self.spawn(self._remove(entry)))

    async def _remove(self, entry: _Entry) -> None:
        if entry.listeners:
            await self._patiently(entry, self._call_listeners(entry, "remove"))
        if entry.channels.in_use:
            await self._patiently(entry, entry.channels.remove())
        # Whoever looks into it lets go at once now; its bases are free when this is answered.
        await self.examining.wait_for(entry.bdev)
        await entry.channels.wait_closing()
        _log.log(entry.log_level, "bdev '%s' is removed", entry.bdev.name)
        self._tell("bdev_unregister", entry.bdev.name)
        await self._close_when_unused(entry)

    async def _patiently(self, entry: _Entry, work: Coroutine[Any, Any, None]) -> None:
        """Await it, and name the bdev when it takes long: its I/O is what is waited for."""
        task = self.spawn(work)
        finished, _ = await asyncio.wait([task], timeout=SLOW_SECONDS)
        if not finished:
            _log.warning("bdev '%s' is slow: its removal waits for I/O in flight", entry.bdev.name)
        await task

    async def let_go(self, bdev: Bdev) -> None:
        """The last channel of ``bdev`` is closed: a removed one closes then."""
        entry = self._held.get(bdev)
        if entry is not None:
            await self._close_when_unused(entry)

    async def _close_when_unused(self, entry: _Entry) -> None:
        if not entry.removed or entry.channels.in_use or entry.closed:
            return
        entry.closed = True
        try:
            if _closes(entry.bdev):
                await asyncio.to_thread(entry.bdev.close)
        finally:
            self._leaving.remove(entry)
            del self._held[entry.bdev]
            _call(entry.on_closed)

    async def resize(self, bdev: Bdev, num_blocks: int, *, force: bool = False) -> None:
        """Set a new size and tell the users.

        Raises: InUse for a shrink while a channel is open, without ``force``; UsageError for no
        blocks.
        """
        entry = self._entry_of(bdev)
        if num_blocks <= 0:
            raise UsageError(f"bdev '{bdev.name}' can't have {num_blocks} blocks")
        if num_blocks < bdev.num_blocks and entry.channels.in_use and not force:
            raise InUse(
                f"bdev '{bdev.name}' is in use and can't shrink from {bdev.num_blocks} "
                f"to {num_blocks} blocks",
                hint="disconnect its users first",
            )
        if num_blocks == bdev.num_blocks:
            return
        _log.info("bdev '%s' has %d blocks now, not %d", bdev.name, num_blocks, bdev.num_blocks)
        bdev.resize(num_blocks)
        self._tell("bdev_resize", bdev.name)
        await self._call_listeners(entry, "resize")

    async def close(self) -> None:
        """Remove every bdev, those on top and newer ones first; the users have let go before."""
        for name in _from_the_top(list(self)):
            with contextlib.suppress(NotFound):  # somebody else is removing it
                await self.remove(name)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SLOW_SECONDS)
        if self._leaving:
            names = ", ".join(entry.bdev.name for entry in self._leaving)
            _log.warning("still held at the end: %s", names)

    def removed_but_held(self) -> int:
        """How many removed bdevs wait for a user to let go."""
        return len(self._leaving)

    async def _call_listeners(self, entry: _Entry, event: str) -> None:
        async def call(listener: Listener) -> None:
            answer = listener(entry.bdev, event)
            if inspect.isawaitable(answer):
                await answer

        calls = [call(listener) for listener in list(entry.listeners)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                _log.error(
                    "a user of bdev '%s' failed at its %s: %r", entry.bdev.name, event, outcome
                )

    def _tell(self, kind: str, name: str) -> None:
        for notify in self._notify:
            notify(kind, name)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it to its end, whatever becomes of the caller."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has seen it


def _from_the_top(bdevs: list[Bdev]) -> list[str]:
    """Their names, each after all that stand on it, and after newer ones if it may be."""
    standing: dict[Bdev, list[Bdev]] = {}
    for bdev in bdevs:
        for base in bdev.bases:
            if base is not None:
                standing.setdefault(base, []).append(bdev)
    order: dict[Bdev, None] = {}

    def put(bdev: Bdev) -> None:
        if bdev in order:
            return
        for upper in reversed(standing.get(bdev, [])):
            put(upper)
        order[bdev] = None

    for bdev in reversed(bdevs):
        put(bdev)
    return [bdev.name for bdev in order]


def _closes(bdev: Bdev) -> bool:
    """Whether its module has anything to give back at the end."""
    from drivebay.bdev.base import Bdev  # compiled; loaded with the first bdev

    return type(bdev).close is not Bdev.close


def _call(callback: Callable[[], None] | None) -> None:
    if callback is not None:
        callback()
