"""`drivebay disk create`: in a pool, on a file or device, or by splitting another disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.cli.disk import show_disk
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call, find_socket
from drivebay.disks.inventory import Inventory, check_name, read_inventory
from drivebay.disks.making import PARTS_MOST, check_base, mebibytes, plan_file_disk, plan_parts
from drivebay.disks.places import place_size
from drivebay.disks.plan import Plan
from drivebay.disks.pools import DEFAULT_POOL, choose_pool, plan_default_pool
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["create"]


def create(client: Client, found: argparse.Namespace) -> int:
    """Make one disk, or the parts of one."""
    inventory = read_inventory(client)
    plan = Plan()
    if found.split is not None:
        return _split(client, found, inventory, plan)
    if found.name is None:
        raise UsageError("the disk has no name", hint="drivebay disk create NAME --size 10G")
    check_name(found.name, "disk")
    if inventory.is_taken(found.name):
        raise AlreadyExists(
            f"there is a disk '{found.name}' already", hint=f"drivebay disk info {found.name}"
        )
    if found.file is not None:
        if found.thick:
            raise UsageError("--thick is for disks in pools: a file has its own space")
        place = Path(found.file).absolute()
        plan_file_disk(
            plan, client, found.name, place, found.size, find_socket(found.socket),
            use_existing=found.yes_use_existing,
        )  # fmt: skip
    else:
        _plan_in_pool(plan, client, found, inventory)
    if carry_out(plan, found):
        _show_new(client, found)
    return DONE


def _show_new(client: Client, found: argparse.Namespace) -> None:
    if found.file is not None:
        call(client, "bdev_wait_for_examine")  # it may hold a pool, which opens now
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    pool = inventory.pool_on(disk)
    show_disk(inventory, disk, found)
    if pool is not None:
        print_warning(
            f"'{disk.place}' holds pool '{pool.name}', which is open now: '{disk.name}' can't be "
            "given to machines, its disks can (drivebay disk list)"
        )


# ---- in a pool ----------------------------------------------------------------------------------


def _plan_in_pool(
    plan: Plan, client: Client, found: argparse.Namespace, inventory: Inventory
) -> None:
    if found.size is None:
        raise UsageError("the disk has no size", hint="add --size, such as 10G")
    size = mebibytes(found.size)
    pool = choose_pool(inventory, found.pool)
    if pool is None:
        plan_default_pool(plan, client, find_socket(found.socket))
        pool_name = DEFAULT_POOL
    else:
        pool_name = pool.name
        if found.thick and found.size > pool.free_clusters * pool.cluster_bytes:
            free = format_size(pool.free_clusters * pool.cluster_bytes)
            raise StateError(
                f"pool '{pool.name}' has {free} left, too little for a thick disk of "
                f"{format_size(found.size)}",
                hint=f"drivebay pool grow {pool.name}, or leave --thick out",
            )
    kind = "thick" if found.thick else "thin"
    plan.add(
        f"make the {kind} disk '{found.name}' of {format_size(found.size)} in pool '{pool_name}'",
        lambda: call(
            client,
            "bdev_lvol_create",
            {
                "lvol_name": found.name,
                "size_in_mib": size,
                "thin_provision": not found.thick,
                "lvs_name": pool_name,
            },
        ),
    )


# ---- by splitting -------------------------------------------------------------------------------


def _split(client: Client, found: argparse.Namespace, inventory: Inventory, plan: Plan) -> int:
    base, text = found.split
    if found.name is not None:
        raise UsageError(
            f"the parts of a split are named after what is split: '{_base_name(base)}p0' and so on",
            hint=f"drivebay disk create --split {base} {text}",
        )
    if found.thick:
        raise UsageError("--thick is for disks in pools")
    if not (text.isascii() and text.isdigit() and 2 <= int(text) <= PARTS_MOST):
        raise UsageError(f"'{text}' is no number of parts from 2 to {PARTS_MOST}")
    parts = int(text)
    if "/" in base and Path(base).exists():
        name, size = _base_name(base), place_size(Path(base))
        if inventory.is_taken(name):
            raise AlreadyExists(f"there is a disk '{name}' already")
        plan_file_disk(
            plan, client, name, Path(base).absolute(), None, find_socket(found.socket),
            use_existing=found.yes_use_existing,
        )  # fmt: skip
    else:
        disk = inventory.disk(base)
        check_base(disk)
        name, size = disk.bdev, disk.size
    plan_parts(plan, client, name, size, parts, found.size)
    if carry_out(plan, found):
        _show_parts(read_inventory(client), name, found)
    return DONE


def _base_name(base: str) -> str:
    return Path(base).name.partition(".")[0] if "/" in base else base


def _show_parts(inventory: Inventory, name: str, found: argparse.Namespace) -> None:
    from drivebay.cli.disk import as_json

    parts = inventory.parts_of(inventory.disk(name))
    if found.json:
        print_json([as_json(inventory, part) for part in parts])
    else:
        print("\n".join(part.name for part in parts))
