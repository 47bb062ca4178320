"""The steps that delete a disk or a pool, refused while something stands on it.

Context: a short-lived process. Planning only looks. What a file or device held stays there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory, Pool, short_name
from drivebay.disks.places import remove_file
from drivebay.disks.plan import Plan
from drivebay.errors import InUse, StateError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["plan_disk_deletion", "plan_pool_deletion", "refuse_shown"]


def plan_disk_deletion(
    plan: Plan,
    client: Client,
    inventory: Inventory,
    disk: Disk,
    *,
    with_snapshots: bool = False,
    with_parts: bool = False,
) -> str | None:
    """Delete a disk with its content, or let go of a file or device, whose content stays.

    Returns the question that has to be asked first. Raises: InUse, StateError.
    """
    _refuse_in_use(disk)
    if disk.snapshot:
        return _plan_snapshot(plan, client, inventory, disk)
    if disk.pool is not None:
        return _plan_volume(plan, client, inventory, disk, with_snapshots=with_snapshots)
    _plan_bdev(plan, client, inventory, disk, with_parts=with_parts)
    return None


def refuse_shown(inventory: Inventory, pool: Pool) -> None:
    """Raises: InUse when controllers show disks of a pool."""
    used = [
        f"{volume.name} on {use.controller}"
        for volume in inventory.volumes
        if volume.pool == pool.name
        for use in volume.uses
    ]
    if used:
        raise InUse(
            f"controllers show disks of pool '{pool.name}' to machines: {', '.join(used)}",
            hint="delete the controllers first: drivebay rpc vhost_delete_controller …",
        )


def plan_pool_deletion(
    plan: Plan, client: Client, inventory: Inventory, pool: Pool, *, keep_file: bool = False
) -> None:
    """Delete a pool with all that is in it, and its file."""
    disks = inventory.disks_of(pool)
    names = ", ".join(disk.name for disk in disks)
    what = f" and {len(disks)} disks ({names})" if disks else ""
    plan.add(
        f"delete pool '{pool.name}'{what}",
        lambda: call(client, "bdev_lvol_delete_lvstore", {"lvs_name": pool.name}),
    )
    place = None if pool.place is None else Path(pool.place)
    if place is not None and pool.module in ("aio", "uring"):
        plan.add(
            f"let go of '{place}'",
            lambda: call(client, f"bdev_{pool.module}_delete", {"name": pool.base}),
        )
        if place.is_file() and not keep_file:
            plan.add(f"delete the file '{place}'", lambda: remove_file(place))
        elif not place.is_file():
            plan.facts.append(
                f"The device '{place}' stays as it is, and can be used for a new pool."
            )


def _refuse_in_use(disk: Disk) -> None:
    if not disk.uses:
        return
    shown = ", ".join(
        f"{use.controller} ({use.sessions} connected)" if use.sessions else use.controller
        for use in disk.uses
    )
    raise InUse(
        f"controllers show disk '{disk.name}' to machines: {shown}",
        hint=_withdrawal(disk.uses[0].controller),
    )


def _withdrawal(controller: str) -> str:
    """How a controller goes: one of a VM's disk with that disk (vm.disks.controller_name)."""
    words = controller.split(".")
    if len(words) == 3 and words[0] == "vm":
        return f"it is VM '{words[1]}' that has it: drivebay vm detach {words[1]} {words[2]}"
    return f'drivebay rpc vhost_delete_controller \'{{"ctrlr": "{controller}"}}\''


def _plan_snapshot(plan: Plan, client: Client, inventory: Inventory, snapshot: Disk) -> str | None:
    """The blocks of a snapshot with one child become that child's; with more it has to stay."""
    children = inventory.children(snapshot)
    if len(children) > 1:
        names = ", ".join(child.name for child in children)
        raise InUse(
            f"{len(children)} disks and snapshots read from '{snapshot.name}': {names}",
            hint=_independent(children[0]),
        )
    _plan_delete(plan, client, snapshot)
    # What it alone holds is lost only when nothing reads from it.
    return None if children else f"Delete snapshot '{snapshot.name}'?"


def _refuse_claimed(disk: Disk) -> None:
    if disk.claimed:
        raise InUse(
            f"another bdev stands on '{disk.name}'",
            hint="drivebay rpc bdev_get_bdevs tells which; delete that first",
        )


def _plan_volume(
    plan: Plan, client: Client, inventory: Inventory, disk: Disk, *, with_snapshots: bool
) -> str:
    _refuse_claimed(disk)
    clones = inventory.clones_of(disk)
    if clones:
        names = ", ".join(clone.name for clone in clones)
        raise InUse(
            f"disk '{disk.name}' has clones, which read from its snapshots: {names}",
            hint=_independent(clones[0]),
        )
    snapshots = inventory.snapshots_of(disk)
    names = ", ".join(short_name(disk, snapshot) for snapshot in snapshots)
    if snapshots and not with_snapshots:
        raise InUse(
            f"disk '{disk.name}' has snapshots: {names}",
            hint="delete them first, or add --with-snapshots to delete them too",
        )
    for volume in [disk, *_newest_first(inventory, snapshots)]:
        _plan_delete(plan, client, volume)
    what = f" and its snapshots {names}" if snapshots else ""
    return f"Delete disk '{disk.name}'{what} with all that is on it?"


def _newest_first(inventory: Inventory, snapshots: list[Disk]) -> list[Disk]:
    """Each before the one that it reads from: then nothing is ever merged."""
    return sorted(snapshots, key=lambda one: len(list(inventory.chain(one))), reverse=True)


def _plan_delete(plan: Plan, client: Client, volume: Disk) -> None:
    what = "snapshot" if volume.snapshot else "disk"
    plan.add(
        f"delete the {what} '{volume.name}' in pool '{volume.pool}'",
        lambda: call(client, "bdev_lvol_delete", {"name": volume.reference}),
    )


def _independent(clone: Disk) -> str:
    return (
        f"to make '{clone.name}' independent: drivebay rpc bdev_lvol_decouple_parent "
        f'\'{{"name": "{clone.reference}"}}\''
    )


def _plan_bdev(
    plan: Plan, client: Client, inventory: Inventory, disk: Disk, *, with_parts: bool
) -> None:
    """A file or device: the target lets go of it, and what is on it stays."""
    pool = inventory.pool_on(disk)
    if pool is not None:
        raise InUse(
            f"pool '{pool.name}' stands on '{disk.name}'", hint=f"drivebay pool delete {pool.name}"
        )
    parts = inventory.parts_of(disk)
    for part in parts:
        _refuse_in_use(part)
    names = ", ".join(part.name for part in parts)
    if parts and not with_parts:
        raise InUse(
            f"disk '{disk.name}' is split into {names}", hint="add --with-parts to join them again"
        )
    if not parts:
        _refuse_claimed(disk)
    if disk.base is not None:
        raise StateError(
            f"'{disk.name}' is a part of '{disk.base}', and parts are made and deleted together",
            hint=f"drivebay disk delete {disk.base} --with-parts",
        )
    if disk.module not in ("aio", "uring"):
        raise StateError(
            f"'{disk.name}' is a {disk.kind}, which this command did not make",
            hint="delete it with the method of its kind: drivebay rpc rpc_get_methods",
        )
    if parts:
        plan.add(
            f"join {names}",
            lambda: call(client, "bdev_split_delete", {"base_bdev": disk.bdev}),
        )
    plan.add(
        f"let go of '{disk.place}', which stays as it is",
        lambda: call(client, f"bdev_{disk.module}_delete", {"name": disk.bdev}),
    )
