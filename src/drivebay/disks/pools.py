"""Which pool a disk goes to, and the steps that make a pool in a file.

Context: a short-lived process. Planning only looks; each step can be taken back, so a pool
that cannot be made leaves no file behind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import call, target_owner
from drivebay.disks.places import (
    check_visible,
    contents_of,
    data_folder,
    default_pool_size,
    holds_data,
    make_sparse_file,
    place_size,
    remove_file,
    resize_file,
)
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.disks.inventory import Inventory, Pool
    from drivebay.rpc.client import Client

__all__ = ["DEFAULT_POOL", "choose_pool", "plan_default_pool", "plan_file_pool", "plan_store"]

DEFAULT_POOL: Final = "default"
_SMALLEST: Final = 64 << 20


def choose_pool(inventory: Inventory, named: str | None) -> Pool | None:
    """The pool that was named, the only one or 'default'; None when there is none at all.

    Raises: NotFound; UsageError when it has to be named.
    """
    if named is not None:
        return inventory.pool(named)
    if len(inventory.pools) == 1:
        return inventory.pools[0]
    default = [pool for pool in inventory.pools if pool.name == DEFAULT_POOL]
    if not inventory.pools or default:
        return default[0] if default else None
    names = ", ".join(pool.name for pool in inventory.pools)
    raise UsageError(f"there are several pools: {names}", hint="name one with --pool POOL")


def plan_default_pool(plan: Plan, client: Client, socket: str) -> None:
    """The pool of those who never made one. Raises: StateError when nothing is left for it."""
    place = data_folder() / "pools" / f"{DEFAULT_POOL}.img"
    size = default_pool_size(place)
    if size < _SMALLEST:
        raise StateError(
            f"the file system of '{place.parent}' has no room for a pool",
            hint="make one elsewhere: drivebay pool create NAME --file FILE --size SIZE",
        )
    plan_file_pool(plan, client, DEFAULT_POOL, place, size, socket)


def plan_file_pool(
    plan: Plan, client: Client, name: str, place: Path, size: int | None, socket: str
) -> None:
    """A pool in a file: one that is made, or one that is there and was never written."""
    if os.path.lexists(place):
        _plan_present_file(plan, place, size, socket)
    else:
        if size is None:
            raise UsageError(f"there is no file '{place}' yet", hint="add --size, such as 300G")
        wanted = size
        plan.add(
            f"make the file '{place}' of {format_size(wanted)}, which takes up what is used of it",
            lambda: make_sparse_file(place, wanted, socket),
            lambda: remove_file(place),
        )
    if size is not None and size < _SMALLEST:
        raise UsageError(
            f"{format_size(size)} is too small for a pool: at least {format_size(_SMALLEST)}"
        )
    plan_store(plan, client, name, str(place))


def _plan_present_file(plan: Plan, place: Path, size: int | None, socket: str) -> None:
    if not place.is_file():
        raise UsageError(
            f"'{place}' is no file", hint="for a pool on a disk or partition: --device"
        )
    found = ", ".join(map(str, contents_of(place)))
    if found or holds_data(place):
        raise InUse(
            f"the file '{place}' is not empty: it holds {found or 'data'}",
            hint="name another file; a pool in a file opens again with: drivebay rpc "
            'bdev_aio_create \'{"name": …, "filename": …}\'',
        )
    check_visible(place, target_owner(socket)[0])
    before = place_size(place)
    if size is not None and size != before:
        plan.add(
            f"make the file '{place}' {format_size(size)} long, sparse",
            lambda: resize_file(place, size),
            lambda: resize_file(place, before),
        )


def plan_store(
    plan: Plan, client: Client, name: str, place: str | None, made: list[str] | None = None
) -> None:
    """The bdev and the store on it; ``made`` gives the place when an earlier step finds it."""
    bdev = f"pool-{name}"
    where = f"'{place}'" if place is not None else "the new partition"

    def open_base() -> None:
        filename = place if place is not None else (made or [""])[0]
        call(client, "bdev_aio_create", {"name": bdev, "filename": filename})
        call(client, "bdev_wait_for_examine")

    plan.add(
        f"open {where} as the bdev '{bdev}'",
        open_base,
        lambda: call(client, "bdev_aio_delete", {"name": bdev}),
    )
    plan.add(
        f"make pool '{name}' in it",
        lambda: call(client, "bdev_lvol_create_lvstore", {"bdev_name": bdev, "lvs_name": name}),
    )
