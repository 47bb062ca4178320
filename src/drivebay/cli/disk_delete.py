"""`drivebay disk delete`: refuses while something stands on the disk, and says what."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory, read_inventory, short_name
from drivebay.disks.plan import Plan
from drivebay.errors import InUse, StateError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["delete"]


def delete(client: Client, found: argparse.Namespace) -> int:
    """Delete a disk with its content, or let go of a file or device, whose content stays."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    _refuse_in_use(disk)
    plan = Plan()
    if disk.snapshot:
        question = _plan_snapshot(plan, client, inventory, disk)
    elif disk.pool is not None:
        question = _plan_volume(plan, client, inventory, disk, found)
    else:
        question = _plan_bdev(plan, client, inventory, disk, found)
    if carry_out(plan, found, question):
        if found.json:
            print_json({"deleted": disk.name, "pool": disk.pool})
        else:
            what = "snapshot" if disk.snapshot else "disk"
            print(disk.name if found.quiet else f"{what} '{disk.name}' deleted")
    return DONE


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
    plan: Plan, client: Client, inventory: Inventory, disk: Disk, found: argparse.Namespace
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
    if snapshots and not found.with_snapshots:
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
    plan: Plan, client: Client, inventory: Inventory, disk: Disk, found: argparse.Namespace
) -> str | None:
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
    if parts and not found.with_parts:
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
    return None
