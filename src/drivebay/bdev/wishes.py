"""Bdevs that are wanted on bases which may come later: SPDK's configuration is such a list.

A wish stays until it is forgotten: its bdev is made when all its bases are there, goes
with them, and is made again when they come back. Context: control.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivebay.errors import DrivebayError, NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry

__all__ = ["Wish", "Wishes"]

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Wish:
    """One: ``make`` is awaited with the bases; ``call`` gives the RPC call that wishes it."""

    module: str
    name: str  # of the bdev; for split, of the base
    bases: tuple[str, ...]
    make: Callable[..., Awaitable[Any]]
    call: Callable[[], tuple[str, dict[str, Any]]]
    settings: dict[str, int] = field(default_factory=dict)  # what may change while it is there
    once: bool = False  # forgotten when a base that it was made on is removed
    made_on: list[Bdev] | None = None


class Wishes:
    """All wishes of a target, in the order in which they were made."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._wishes: list[Wish] = []
        registry.examining.on_arrival(self._arrived, self._awaited)
        registry.on_event(self._happened)

    def __iter__(self) -> Iterator[Wish]:
        return iter(list(self._wishes))

    def find(self, module: str, name: str) -> Wish | None:
        """The wish of one module for one name."""
        return next((w for w in self._wishes if (w.module, w.name) == (module, name)), None)

    async def add(self, wish: Wish) -> Any:
        """Keep it, and make it now if its bases are here.

        Returns what ``make`` did, or None when a base is missing. Raises: what ``make``
        raises; the wish is not kept then.
        """
        bases = self._bases_of(wish)
        self._wishes.append(wish)
        if bases is None:
            _log.info("%s '%s' waits for %s", wish.module, wish.name, ", ".join(wish.bases))
            return None
        try:
            return await self._make(wish, bases)
        except BaseException:
            self._wishes.remove(wish)
            raise

    def forget(self, wish: Wish) -> None:
        """Wish it no more; its bdev is the caller's to remove."""
        self._wishes.remove(wish)

    def _bases_of(self, wish: Wish) -> list[Bdev] | None:
        try:
            return [self._registry.get(name) for name in wish.bases]
        except NotFound:
            return None

    async def _make(self, wish: Wish, bases: list[Bdev]) -> Any:
        wish.made_on = bases
        try:
            return await wish.make(*bases)
        except BaseException:
            wish.made_on = None
            raise

    def _happened(self, kind: str, name: str) -> None:
        if kind != "bdev_unregister":
            return
        for wish in self:
            if wish.once and any(base not in self._registry for base in wish.made_on or ()):
                self.forget(wish)

    def _granted_by(self, bdev: Bdev, wish: Wish) -> list[Bdev] | None:
        """The bases of a wish that can come true now that ``bdev`` is here."""
        bases = self._bases_of(wish)
        return bases if bases is not None and bdev in bases and bases != wish.made_on else None

    def _awaited(self, bdev: Bdev) -> bool:
        return any(self._granted_by(bdev, wish) is not None for wish in self._wishes)

    async def _arrived(self, bdev: Bdev) -> None:
        for wish in self:
            bases = self._granted_by(bdev, wish)
            if bases is None:
                continue
            try:
                await self._make(wish, bases)
            except DrivebayError as error:
                _log.error("%s '%s' can't be made: %s", wish.module, wish.name, error)
