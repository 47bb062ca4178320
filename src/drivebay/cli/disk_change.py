"""`drivebay disk resize|snapshot|revert|limit`: what changes a disk that is there."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Final

from drivebay.cli.disk import show_disk, spell_limits
from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call
from drivebay.disks.growing import plan_disk_size
from drivebay.disks.inventory import Disk, read_inventory, short_name
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.disks.snapshots import (
    plan_end_of_revert,
    plan_revert,
    plan_snapshot,
    refuse_connected,
    refuse_snapshot,
)
from drivebay.errors import InUse, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["limit", "resize", "revert", "snapshot"]

_MIB: Final = 1 << 20


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


def revert(client: Client, found: argparse.Namespace) -> int:
    """Make a disk's content and size those of one of its snapshots."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    refuse_snapshot(disk, "can't be reverted")
    refuse_connected(disk)
    snap = inventory.snapshot_of(disk, found.snap)
    plan = Plan()
    newer = [
        short_name(disk, other)
        for other in inventory.chain(disk)
        if other.name != snap.name and snap in list(inventory.chain(other))
    ]
    if newer:
        plan.facts.append(f"Newer snapshots stay: {', '.join(newer)}.")
    plan_revert(plan, client, inventory, disk, snap)
    plan_end_of_revert(plan, client, [disk])
    question = f"Go back to '{snap.name}' and lose what was written to '{disk.name}' since?"
    if carry_out(plan, found, question):
        inventory = read_inventory(client)
        show_disk(inventory, inventory.disk(disk.reference), found)
    return DONE


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
