"""The stores of logical volumes of a target; their code is loaded when there is one.

Context: control (the asyncio thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.lvol.store import Store
    from drivebay.bdev.lvol.stores import Stores
    from drivebay.bdev.lvol.volume import Volume
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["TargetStores"]

_SIGNATURE: Final = b"SPDKBLOB"
_SUPER_BLOCK_BYTES: Final = 4096


class TargetStores:
    """What stands between a target and bdev/lvol/stores: it looks at each new bdev."""

    def __init__(self, registry: BdevRegistry, owner: Callable[[], Reactor]) -> None:
        self._registry = registry
        self._owner = owner
        self._loaded: Stores | None = None
        registry.examining.on_arrival(self._arrived, self._awaited)
        registry.examining.on_examine(self._examine, lambda head: head.startswith(_SIGNATURE))

    def _load(self) -> Stores:
        if self._loaded is None:
            from drivebay.bdev.lvol.stores import Stores

            self._loaded = Stores(self._registry, self._owner)
        return self._loaded

    def _awaited(self, bdev: Bdev) -> bool:
        return any(store.misses(bdev) for store in self)

    async def _arrived(self, bdev: Bdev) -> None:
        await self._load().arrived(bdev)

    async def _examine(self, bdev: Bdev) -> None:
        if "read" in bdev.io_types and bdev.num_blocks * bdev.block_size >= _SUPER_BLOCK_BYTES:
            await self._load().examine(bdev)

    def __iter__(self) -> Iterator[Store]:
        return iter(self._loaded or ())

    def find(self, name: str | None = None, uuid: str | None = None) -> Store | None:
        """The store of that name or uuid."""
        return None if self._loaded is None else self._loaded.find(name, uuid)

    def volume(self, name: str) -> Volume:
        """A volume by its bdev's name, alias or uuid. Raises: NotFound."""
        if self._loaded is None:
            raise NotFound(f"there is no volume '{name[:80]}'; there is no store at all")
        return self._loaded.volume(name)

    async def create(self, bdev: Bdev, name: str, **options: Any) -> Store:
        """Make a store. Raises: DrivebayError."""
        return await self._load().create(bdev, name, **options)

    async def rename(self, store: Store, name: str) -> None:
        """Give a store another name. Raises: DrivebayError."""
        await self._load().rename(store, name)

    async def destroy(self, store: Store) -> None:
        """Delete a store and its volumes. Raises: DrivebayError."""
        await self._load().destroy(store)

    async def close(self) -> None:
        """Leave all stores as they shall be found; their volumes are gone then."""
        if self._loaded is not None:
            await self._loaded.close()
