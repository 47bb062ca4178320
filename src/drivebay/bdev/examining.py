"""What follows from a new bdev: those who waited for it have it, then it is looked into.

Looking into a bdev is reading whether it carries a partition table, a volume store or a RAID
superblock. It goes on after the creation was answered. Context: control.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import AlreadyExists, DrivebayError, NotFound, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["Examiner", "Examining"]

_log = logging.getLogger(__name__)

Examiner = Callable[["Bdev"], Awaitable[None]]
Awaited = Callable[["Bdev"], bool]
Glance = Callable[[bytes], bool]

_AT_ONCE: Final = 16  # bdevs that are open for being looked into; a store may bring thousands
_HEAD_BYTES: Final = 4096


class Examining:
    """Who is asked about each new bdev of a registry, and what is being looked into."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._on_arrival: list[tuple[Awaited, Examiner]] = []
        self._examiners: list[tuple[Glance, Examiner]] = []
        self._tasks: dict[asyncio.Task[None], Bdev] = {}
        self._new: OrderedDict[Bdev, None] = OrderedDict()  # to be looked into, the oldest first
        self._looks = 0  # that go on
        self._going = asyncio.Event()
        self._going.set()
        self._pauses = 0
        self.reactor: Callable[[], Reactor] | None = None  # where bdevs are opened for it
        self.automatic = True
        self.by_hand: list[str] = []  # names; only these are looked into when not automatic
        self.spared: frozenset[str] = frozenset()  # names that are not: a guest writes there

    def on_arrival(self, examiner: Examiner, awaited: Awaited = lambda bdev: True) -> None:
        """Await ``examiner(bdev)`` for each new bdev before its creation is answered.

        ``awaited`` says whether anybody waited for it: for most bdevs nobody did.
        """
        self._on_arrival.append((awaited, examiner))

    def on_examine(self, examiner: Examiner, concerns: Glance = lambda head: True) -> None:
        """Await ``examiner(bdev)`` for each new bdev that nobody has claimed.

        ``concerns`` says from the first bytes whether it is worth a look: most disks carry
        nothing. They may read it, one after the other; a claim by one of them ends the round.
        """
        self._examiners.append((concerns, examiner))

    async def arrive(self, bdev: Bdev) -> None:
        """A bdev is new; returns when those who waited for it have it."""
        await self._ask(self._waiting_for(bdev), bdev)
        self._examine_unasked(bdev)

    def arrive_soon(self, bdev: Bdev) -> None:
        """The same, without waiting for it; wait() does."""
        if any(self._waiting_for(bdev)):
            self._follow(self.arrive(bdev), bdev)
        else:
            self._examine_unasked(bdev)

    def _waiting_for(self, bdev: Bdev) -> Iterator[Examiner]:
        return (examiner for awaited, examiner in self._on_arrival if awaited(bdev))

    def _examine_unasked(self, bdev: Bdev) -> None:
        if self._examiners and self.may_examine(bdev):
            self.examine(bdev)

    def may_examine(self, bdev: Bdev) -> bool:
        """Whether it may be looked into without being asked."""
        if self.automatic and not self.spared:
            return True
        names = {bdev.name, str(bdev.uuid), *bdev.aliases}
        if not names.isdisjoint(self.spared):
            return False
        return self.automatic or not names.isdisjoint(self.by_hand)

    def examine(self, bdev: Bdev) -> None:
        """Look into a bdev when its turn comes; wait() waits for the end."""
        self._new[bdev] = None
        self._begin()

    def examine_by_hand(self, name: str) -> None:
        """Look into a bdev now, or when it comes. Raises: UsageError, AlreadyExists."""
        if self.automatic:
            raise UsageError(
                f"bdev '{name[:80]}' can't be examined by hand while bdev_auto_examine is on",
                field="name",
            )
        if name in self.by_hand:
            raise AlreadyExists(f"bdev '{name[:80]}' was to be examined by hand already")
        self.by_hand.append(name)
        with contextlib.suppress(NotFound):
            self.examine(self._registry.get(name))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Begin no look meanwhile: whoever brings thousands of bdevs has them here sooner."""
        self._pauses += 1
        self._going.clear()
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._going.set()
                self._begin()

    async def wait(self) -> None:
        """Wait until every bdev that is here has been looked into."""
        while self._tasks or self._new:
            await self._going.wait()
            if self._tasks:
                await asyncio.wait(set(self._tasks))

    async def wait_for(self, bdev: Bdev) -> None:
        """Wait until nobody looks into this bdev any more."""
        looking = [task for task, looked_into in self._tasks.items() if looked_into is bdev]
        if looking:
            await asyncio.wait(looking)

    def _begin(self) -> None:
        """As many looks as may go on; one that ends begins the next."""
        while self._new and self._pauses == 0 and self._looks < _AT_ONCE:
            bdev, _ = self._new.popitem(last=False)
            if bdev in self._registry:
                self._looks += 1
                self._follow(self._examine(bdev), bdev).add_done_callback(self._looked)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looks -= 1
        self._begin()

    def _follow(self, work: Coroutine[Any, Any, None], bdev: Bdev) -> asyncio.Task[None]:
        task = self._registry.spawn(work)
        self._tasks[task] = bdev
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        bdev = self._tasks.pop(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            _log.error("looking into bdev '%s' failed", bdev.name, exc_info=fault)

    async def _examine(self, bdev: Bdev) -> None:
        head = await self._head(bdev)
        concerned = [
            examiner for concerns, examiner in self._examiners if head is None or concerns(head)
        ]
        await self._ask(concerned, bdev)

    async def _head(self, bdev: Bdev) -> bytes | None:
        """The first bytes; None when they can't be read: each examiner hears of that itself."""
        length = max(_HEAD_BYTES, bdev.block_size)
        if self.reactor is None or bdev.num_blocks * bdev.block_size < length:
            return None
        try:
            async with self._registry.access(bdev, self.reactor()) as access:
                return await access.read(0, length)
        except DrivebayError:
            return None

    async def _ask(self, examiners: Iterable[Examiner], bdev: Bdev) -> None:
        for examiner in examiners:
            if bdev not in self._registry or self._registry.claims(bdev).kind is not None:
                return
            try:
                await examiner(bdev)
            except DrivebayError as error:
                _log.error("looking into bdev '%s' failed: %s", bdev.name, error)
