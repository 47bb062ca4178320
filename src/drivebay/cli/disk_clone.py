"""`drivebay disk clone`: a new disk that begins with the content of another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from drivebay.cli.connection import call, connect
from drivebay.cli.disk import show_disk
from drivebay.cli.disk_change import plan_snapshot
from drivebay.cli.inventory import Disk, Inventory, check_name, read_inventory
from drivebay.cli.output import DONE
from drivebay.cli.progress import watch
from drivebay.cli.steps import Plan, carry_out
from drivebay.errors import AlreadyExists, StateError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["clone"]

# A copy of a large disk takes hours; the answer comes when it is done.
_COPY_LIMIT_S: Final = 7 * 24 * 3600.0
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
            lambda: _copy(client, found.socket, new),
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


def _copy(client: Client, socket: str | None, name: str) -> None:
    """Take over the parents' clusters, layer by layer, so that the clone stays thin."""
    with connect(socket, _COPY_LIMIT_S) as worker:
        for _ in range(_LAYERS_MOST):
            lvol = _lvol(client, name)
            if "base_snapshot" not in lvol:
                return
            pool = name.partition("/")[0]
            below = _lvol(client, f"{pool}/{lvol['base_snapshot']}")["num_allocated_clusters"]
            had = lvol["num_allocated_clusters"]

            def look(had: int = had, below: int = below) -> tuple[int, int]:
                return _lvol(client, name)["num_allocated_clusters"] - had, below

            watch(
                f"copying {name}",
                lambda: call(worker, "bdev_lvol_decouple_parent", {"name": name}),
                look,
            )


def _lvol(client: Client, name: str) -> dict[str, Any]:
    found: dict[str, Any] = call(client, "bdev_get_bdevs", {"name": name})[0]
    specific: dict[str, Any] = found["driver_specific"]["lvol"]
    return specific
