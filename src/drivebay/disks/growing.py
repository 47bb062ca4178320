"""The steps that make a disk or a pool another size.

Context: a short-lived process. Planning only looks; whether a disk may become smaller is the
caller's to ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Pool
from drivebay.disks.making import mebibytes
from drivebay.disks.places import resize_file
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import StateError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["plan_disk_size", "plan_pool_growth"]


def plan_disk_size(plan: Plan, client: Client, disk: Disk, size: int) -> None:
    """Give a disk in a pool or on a file another size. Raises: StateError, UsageError."""
    if disk.pool is None:
        _plan_file_size(plan, client, disk, size)
        return
    wanted = mebibytes(size)
    plan.add(
        f"make disk '{disk.name}' {format_size(size)} large (now {format_size(disk.size)})",
        lambda: call(client, "bdev_lvol_resize", {"name": disk.reference, "size_in_mib": wanted}),
    )


def _plan_file_size(plan: Plan, client: Client, disk: Disk, size: int) -> None:
    place = None if disk.place is None else Path(disk.place)
    if place is None or not place.is_file():
        raise StateError(
            f"disk '{disk.name}' is no file and in no pool: its size is that of what it stands on"
        )
    if size % disk.block_size:
        raise UsageError(f"{size} bytes are no whole number of blocks of {disk.block_size} bytes")
    before = place.stat().st_size
    plan.add(
        f"make the file '{place}' {format_size(size)} long (now {format_size(before)})",
        lambda: resize_file(place, size),
        # Taking back a cut would give zeroes for what was cut off.
        (lambda: resize_file(place, before)) if size > before else None,
    )
    plan.add(
        "tell the target its size",
        lambda: call(client, f"bdev_{disk.module}_rescan", {"name": disk.bdev}),
    )


def plan_pool_growth(plan: Plan, client: Client, pool: Pool, size: int | None) -> None:
    """Make a pool larger: its file first, if ``size`` says so. Raises: StateError, UsageError."""
    place = None if pool.place is None else Path(pool.place)
    if place is None or pool.module not in ("aio", "uring"):
        raise StateError(
            f"pool '{pool.name}' stands on the bdev '{pool.base}', which this command can't grow",
            hint=f"when it has grown: drivebay rpc bdev_lvol_grow_lvstore "
            f'\'{{"lvs_name": "{pool.name}"}}\'',
        )
    if size is not None:
        _plan_longer_file(plan, pool, place, size)
    plan.add(
        f"tell the target the size of '{place}'",
        lambda: call(client, f"bdev_{pool.module}_rescan", {"name": pool.base}),
    )
    plan.add(
        f"give the new space to pool '{pool.name}'",
        lambda: call(client, "bdev_lvol_grow_lvstore", {"lvs_name": pool.name}),
    )


def _plan_longer_file(plan: Plan, pool: Pool, place: Path, size: int) -> None:
    if not place.is_file():
        raise UsageError(
            f"pool '{pool.name}' is on the device '{place}', which has the size that it has",
            hint="leave --size out to take over what the device has now",
        )
    before = place.stat().st_size
    if size <= before:
        raise UsageError(
            f"pool '{pool.name}' is {format_size(before)} large, and a pool can't be made smaller"
        )
    if pool.growable_bytes and size > pool.growable_bytes:
        raise UsageError(
            f"pool '{pool.name}' can't grow beyond {format_size(pool.growable_bytes)}: its table "
            "of clusters has no more room"
        )
    plan.add(
        f"make the file '{place}' {format_size(size)} long, sparse",
        lambda: resize_file(place, size),
        lambda: resize_file(place, before),
    )
