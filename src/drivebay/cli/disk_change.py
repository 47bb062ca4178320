"""`drivebay disk resize|snapshot|revert|limit`: what changes a disk that is there."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Final

from drivebay.cli.disk import refuse_snapshot, show_disk, spell_limits
from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call
from drivebay.disks.growing import plan_disk_size
from drivebay.disks.inventory import (
    NAME_BYTES_MOST,
    Disk,
    Inventory,
    check_name,
    read_inventory,
    short_name,
)
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["limit", "plan_snapshot", "resize", "revert", "snapshot"]

_MIB: Final = 1 << 20
# The snapshot that a revert makes and deletes; nobody can call one of theirs so.
_ASIDE: Final = "@"


def resize(client: Client, found: argparse.Namespace) -> int:
    """Make a disk larger, or smaller when nobody is connected and it was asked for."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    refuse_snapshot(disk, "keeps its size")
    size: int = found.size
    plan = Plan()
    if size < disk.size:
        _check_shrink(disk, found)
        plan.facts.append(f"What lies behind {format_size(size)} is lost.")
    plan_disk_size(plan, client, disk, size)
    if carry_out(plan, found):
        inventory = read_inventory(client)
        show_disk(inventory, inventory.disk(disk.reference), found)
    return DONE


def _check_shrink(disk: Disk, found: argparse.Namespace) -> None:
    if disk.sessions:
        names = ", ".join(use.controller for use in disk.uses if use.sessions)
        raise InUse(
            f"disk '{disk.name}' can't be made smaller while machines are connected: {names}",
            hint="shut them down first",
        )
    if not found.yes_shrink:
        raise InUse(
            f"disk '{disk.name}' has {format_size(disk.size)}, and what lies behind "
            f"{format_size(found.size)} would be lost",
            hint="shrink the file system in it first, then add --yes-shrink",
        )


# ---- snapshots ----------------------------------------------------------------------------------


def snapshot(client: Client, found: argparse.Namespace) -> int:
    """Keep a disk's present state under a name."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    plan = Plan()
    name = found.snap or time.strftime("%Y%m%d-%H%M%S")
    full = plan_snapshot(plan, client, inventory, disk, name)
    if carry_out(plan, found):
        inventory = read_inventory(client)
        show_disk(inventory, inventory.disk(f"{disk.pool}/{full}"), found)
    return DONE


def plan_snapshot(plan: Plan, client: Client, inventory: Inventory, disk: Disk, name: str) -> str:
    """Add the step that makes a snapshot; returns its name in the pool."""
    refuse_snapshot(disk, "has no snapshots of its own")
    if disk.pool is None:
        raise StateError(
            f"disk '{disk.name}' is in no pool, and only disks in pools have snapshots",
            hint="drivebay disk create NAME --size SIZE makes one in a pool",
        )
    check_name(name, "snapshot")
    full = f"{disk.name}@{name}"
    if len(full.encode()) > NAME_BYTES_MOST:
        raise UsageError(
            f"'{full}' is too long: the names of a disk and its snapshot have at most "
            f"{NAME_BYTES_MOST - 1} bytes together"
        )
    if any(full == other.name and other.pool == disk.pool for other in inventory.volumes):
        raise AlreadyExists(f"disk '{disk.name}' has a snapshot '{name}' already")
    plan.add(
        f"make the snapshot '{full}'",
        lambda: call(
            client,
            "bdev_lvol_snapshot",
            {"lvol_name": disk.reference, "snapshot_name": full},
        ),
    )
    return full


def revert(client: Client, found: argparse.Namespace) -> int:
    """Make a disk's content and size those of one of its snapshots.

    What was written since moves into a snapshot that is deleted at the end; so the disk, which
    has no blocks of its own then, is put on the one that was named. It stays the same bdev,
    with its uuid, limits and controllers, and holds either the old or the new content at any
    moment. Should the target die between two steps, the same command begins anew.
    """
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    refuse_snapshot(disk, "can't be reverted")
    if disk.sessions:
        names = ", ".join(use.controller for use in disk.uses if use.sessions)
        raise InUse(
            f"disk '{disk.name}' can't be reverted under machines that are connected: {names}",
            hint="shut them down first",
        )
    snap = inventory.snapshot_of(disk, found.snap)
    plan = Plan()
    newer = [
        short_name(disk, other)
        for other in inventory.chain(disk)
        if other.name != snap.name and snap in list(inventory.chain(other))
    ]
    if newer:
        plan.facts.append(f"Newer snapshots stay: {', '.join(newer)}.")
    _plan_revert(plan, client, inventory, disk, snap)
    question = f"Go back to '{snap.name}' and lose what was written to '{disk.name}' since?"
    if carry_out(plan, found, question):
        inventory = read_inventory(client)
        show_disk(inventory, inventory.disk(disk.reference), found)
    return DONE


def _plan_revert(plan: Plan, client: Client, inventory: Inventory, disk: Disk, snap: Disk) -> None:
    aside = f"{disk.name}@{_ASIDE}"

    def delete() -> object:
        return call(client, "bdev_lvol_delete", {"name": f"{disk.pool}/{aside}"})

    def resize_to(size: int) -> object:
        params = {"name": disk.reference, "size_in_mib": size // _MIB}
        return call(client, "bdev_lvol_resize", params)

    if any(other.name == aside and other.pool == disk.pool for other in inventory.volumes):
        plan.add(f"delete '{aside}', which an earlier try has left", delete)
    plan.add(
        f"move what was written to '{disk.name}' into '{aside}'",
        lambda: call(
            client, "bdev_lvol_snapshot", {"lvol_name": disk.reference, "snapshot_name": aside}
        ),
        delete,
    )
    if disk.size != snap.size:
        plan.add(
            f"make '{disk.name}' {format_size(snap.size)} large, as '{snap.name}' is",
            lambda: resize_to(snap.size),
            lambda: resize_to(disk.size),
        )
    plan.add(
        f"let '{disk.name}' begin with '{snap.name}'",
        lambda: call(
            client,
            "bdev_lvol_set_parent",
            {"lvol_name": disk.reference, "parent_name": snap.reference},
        ),
    )
    plan.add(f"delete '{aside}'", delete)


# ---- limits -------------------------------------------------------------------------------------


def limit(client: Client, found: argparse.Namespace) -> int:
    """Bound a disk's speed; limits that are not named stay as they are."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    given = {
        "rw_ios_per_sec": found.iops,
        "rw_mbytes_per_sec": found.mbps,
        "r_mbytes_per_sec": found.read_mbps,
        "w_mbytes_per_sec": found.write_mbps,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        raise UsageError(
            "no limit was named", hint=f"drivebay disk limit {disk.name} --iops 10000 --mbps 200"
        )
    plan = Plan()
    words = ", ".join(f"{name} {value or 'off'}" for name, value in wanted.items())
    plan.add(
        f"limit disk '{disk.name}': {words}",
        lambda: call(client, "bdev_set_qos_limit", {"name": disk.reference, **wanted}),
    )
    if carry_out(plan, found):
        disk = read_inventory(client).disk(disk.reference)
        if found.json:
            print_json({"name": disk.name, "limits": dict(disk.limits)})
        else:
            shown = f"{disk.name}: {spell_limits(disk) or 'no limits'}"
            print(disk.name if found.quiet else shown)
    return DONE
