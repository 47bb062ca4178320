"""Snapshots of disks in pools: how one is made, and gone back to.

Context: a short-lived process that plans; nothing is changed before a plan runs. The snapshot
TAG of a disk is a volume beside it, called DISK@TAG.

    going back:   web ─► a, then              web ─► web@@ ─► a     what was written moves aside
                                              web ─► a              it begins with the snapshot
                                              web@@ is deleted      only now can nothing come back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import call
from drivebay.disks.inventory import NAME_BYTES_MOST, Disk, Inventory, check_name
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, DrivebayError, InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = [
    "check_free_for_snapshot",
    "plan_end_of_revert",
    "plan_revert",
    "plan_snapshot",
    "refuse_connected",
    "refuse_snapshot",
]

_MIB: Final = 1 << 20
# The snapshot that a revert makes and deletes; nobody can call one of theirs so.
_ASIDE: Final = "@"


def refuse_snapshot(disk: Disk, what: str) -> None:
    """Refuse to do to a snapshot what only a disk can bear. Raises: StateError."""
    if disk.snapshot:
        raise StateError(
            f"'{disk.name}' is a snapshot, and a snapshot {what}",
            hint=f"make a disk of it: drivebay disk clone {disk.name} NEW",
        )


# ---- taking -------------------------------------------------------------------------------------


def check_free_for_snapshot(inventory: Inventory, disk: Disk, tag: str) -> str:
    """The name in the pool that a disk's snapshot would have.

    Raises: StateError for what has no snapshots; UsageError, AlreadyExists for the name.
    """
    refuse_snapshot(disk, "has no snapshots of its own")
    if disk.pool is None:
        raise StateError(
            f"disk '{disk.name}' is in no pool, and only disks in pools have snapshots",
            hint="drivebay disk create NAME --size SIZE makes one in a pool",
        )
    check_name(tag, "snapshot")
    full = f"{disk.name}@{tag}"
    if len(full.encode()) > NAME_BYTES_MOST:
        raise UsageError(
            f"'{full}' is too long: the names of a disk and its snapshot have at most "
            f"{NAME_BYTES_MOST - 1} bytes together"
        )
    if inventory.has(disk.pool, full):
        raise AlreadyExists(
            f"disk '{disk.name}' has a snapshot '{tag}' already",
            hint=f"drivebay disk delete {disk.pool}/{full}",
        )
    return full


def plan_snapshot(plan: Plan, client: Client, inventory: Inventory, disk: Disk, tag: str) -> str:
    """Add the step that makes a snapshot; return its name in the pool. Raises: as the check."""
    full = check_free_for_snapshot(inventory, disk, tag)
    plan.add(
        f"make the snapshot '{full}'",
        lambda: call(
            client,
            "bdev_lvol_snapshot",
            {"lvol_name": disk.reference, "snapshot_name": full},
        ),
    )
    return full


# ---- going back ---------------------------------------------------------------------------------


def refuse_connected(disk: Disk) -> None:
    """Raises: InUse when machines use the disk, which its content can't change under."""
    if disk.sessions:
        names = ", ".join(use.controller for use in disk.uses if use.sessions)
        raise InUse(
            f"disk '{disk.name}' can't be reverted under machines that are connected: {names}",
            hint="shut them down first",
        )


def plan_revert(plan: Plan, client: Client, inventory: Inventory, disk: Disk, snap: Disk) -> None:
    """Make a disk's content and size those of one of its snapshots.

    It stays the same bdev, with its uuid, limits and controllers. All steps can be taken back
    until `plan_end_of_revert`. Should the target die between two, the same begins anew.
    """
    aside = f"{disk.name}@{_ASIDE}"

    def resize_to(size: int) -> object:
        params = {"name": disk.reference, "size_in_mib": size // _MIB}
        return call(client, "bdev_lvol_resize", params)

    def begin_with(parent: str) -> object:
        params = {"lvol_name": disk.reference, "parent_name": f"{disk.pool}/{parent}"}
        return call(client, "bdev_lvol_set_parent", params)

    def go_on_where_it_was() -> None:
        if disk.size != snap.size:
            resize_to(disk.size)
        begin_with(aside)

    if inventory.has(disk.pool, aside):
        plan.add(f"delete '{aside}', which an earlier try has left", _deleter(client, disk, aside))
    plan.add(
        f"move what was written to '{disk.name}' into '{aside}'",
        lambda: call(
            client, "bdev_lvol_snapshot", {"lvol_name": disk.reference, "snapshot_name": aside}
        ),
        _deleter(client, disk, aside),
    )
    if disk.size != snap.size:
        plan.add(
            f"make '{disk.name}' {format_size(snap.size)} large, as '{snap.name}' is",
            lambda: resize_to(snap.size),
            lambda: resize_to(disk.size),
        )
    plan.add(
        f"let '{disk.name}' begin with '{snap.name}'",
        lambda: begin_with(snap.name),
        go_on_where_it_was,
    )


def plan_end_of_revert(plan: Plan, client: Client, disks: Sequence[Disk]) -> None:
    """Delete what was moved aside. It is the last step, and what fails in it is told only.

    The disks are as wished by then; what stays is deleted by the next revert.
    """
    names = [f"{disk.name}@{_ASIDE}" for disk in disks]

    def delete() -> None:
        for disk, name in zip(disks, names, strict=True):
            try:
                _deleter(client, disk, name)()
            except DrivebayError as error:
                plan.left.append(f"'{disk.pool}/{name}' stays, and takes up space: {error}")

    plan.add("delete " + ", ".join(f"'{name}'" for name in names), delete)


def _deleter(client: Client, disk: Disk, name: str) -> Callable[[], object]:
    return lambda: call(client, "bdev_lvol_delete", {"name": f"{disk.pool}/{name}"})
