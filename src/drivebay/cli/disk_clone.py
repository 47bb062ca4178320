"""`drivebay disk clone`: a new disk that begins with the content of another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from drivebay.cli.disk import show_disk
from drivebay.cli.following import call_to_the_end, lvol_of
from drivebay.cli.output import DONE
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory, check_name, read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.snapshots import plan_snapshot
from drivebay.errors import AlreadyExists, StateError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["clone", "copy_parents"]

_LAYERS_MOST: Final = 1024


def clone(client: Client, found: argparse.Namespace) -> int:
    """Make a clone of a snapshot, or of a disk's present state by way of a new snapshot."""
    inventory = read_inventory(client)
    source = inventory.disk(found.name)
    check_name(found.new, "disk")
    if inventory.is_taken(found.new):
        raise AlreadyExists(f"there is a disk '{found.new}' already")
    if source.pool is None:
        raise StateError(
            f"disk '{source.name}' is in no pool, and only disks in pools can be cloned",
            hint="drivebay disk create NAME --size SIZE makes one in a pool",
        )
    plan = Plan()
    new = f"{source.pool}/{found.new}"
    snap = (
        source.name
        if source.snapshot
        else _plan_own_snapshot(plan, client, inventory, source, found)
    )
    parent = f"{source.pool}/{snap}"
    plan.add(
        f"make the disk '{found.new}', which begins with '{snap}'",
        lambda: call(client, "bdev_lvol_clone", {"snapshot_name": parent, "clone_name": found.new}),
        lambda: call(client, "bdev_lvol_delete", {"name": new}),
    )
    if found.full:
        plan.add(
            f"copy all that '{found.new}' reads from snapshots",
            lambda: copy_parents(client, found.socket, new),
        )
        if not source.snapshot:
            plan.add(
                f"delete the snapshot '{snap}'",
                lambda: call(client, "bdev_lvol_delete", {"name": parent}),
            )
    if carry_out(plan, found):
        inventory = read_inventory(client)
        show_disk(inventory, inventory.disk(new), found)
    return DONE


def _plan_own_snapshot(
    plan: Plan, client: Client, inventory: Inventory, source: Disk, found: argparse.Namespace
) -> str:
    """A disk that is written cannot be shared: its state now becomes a snapshot DISK@NEW."""
    snapshot = plan_snapshot(plan, client, inventory, source, found.new)
    plan.undo_last(lambda: call(client, "bdev_lvol_delete", {"name": f"{source.pool}/{snapshot}"}))
    return snapshot


def copy_parents(client: Client, socket: str | None, name: str) -> None:
    """Take over the parents' clusters, layer by layer, so that the clone stays thin."""
    for _ in range(_LAYERS_MOST):
        if "base_snapshot" not in lvol_of(client, name):
            return
        call_to_the_end(client, socket, "bdev_lvol_decouple_parent", {"name": name})
