"""`drivebay disk create`: in a pool, on a file or device, or by splitting another disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.cli.disk import show_disk
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call, find_socket, target_owner
from drivebay.disks.inventory import Disk, Inventory, check_name, read_inventory
from drivebay.disks.places import (
    check_visible,
    contents_of,
    make_sparse_file,
    place_size,
    remove_file,
)
from drivebay.disks.plan import Plan
from drivebay.disks.pools import DEFAULT_POOL, choose_pool, plan_default_pool
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["create", "mebibytes"]

_MIB: Final = 1 << 20
_PARTS_MOST: Final = 1024


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
        _plan_file(plan, client, found, found.name, place)
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


def mebibytes(size: int) -> int:
    """SPDK counts volumes in MiB. Raises: UsageError for what is no whole number of them."""
    if size <= 0 or size % _MIB:
        raise UsageError(f"a disk in a pool has a whole number of MiB, and {size} bytes is none")
    return size // _MIB


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


# ---- on a file or device ------------------------------------------------------------------------


def _plan_file(
    plan: Plan, client: Client, found: argparse.Namespace, name: str, place: Path
) -> None:
    """A file that is made, or a file or device that is there and holds nothing known."""
    socket = find_socket(found.socket)
    if not place.exists():
        if found.size is None:
            raise UsageError(f"there is no file '{place}' yet", hint="add --size, such as 10G")
        plan.add(
            f"make the file '{place}' of {format_size(found.size)}, which takes up what is used "
            "of it",
            lambda: make_sparse_file(place, found.size, socket),
            lambda: remove_file(place),
        )
    else:
        _check_present(found, place, socket)
    plan.add(
        f"open '{place}' as the disk '{name}'",
        lambda: call(client, "bdev_aio_create", {"name": name, "filename": str(place)}),
        lambda: call(client, "bdev_aio_delete", {"name": name}),
    )


def _check_present(found: argparse.Namespace, place: Path, socket: str) -> None:
    size = place_size(place)
    if found.size is not None and found.split is None and found.size != size:
        raise UsageError(
            f"'{place}' is there already, with {format_size(size)}",
            hint="leave --size out, or resize the disk afterwards",
        )
    holds = contents_of(place)
    if holds and not found.yes_use_existing:
        what = ", ".join(map(str, holds))
        raise InUse(
            f"'{place}' is not empty: it holds {what}",
            hint="a machine could overwrite that; if it may: --yes-use-existing",
        )
    check_visible(place, target_owner(socket)[0])


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
    if not (text.isascii() and text.isdigit() and 2 <= int(text) <= _PARTS_MOST):
        raise UsageError(f"'{text}' is no number of parts from 2 to {_PARTS_MOST}")
    parts = int(text)
    if "/" in base and Path(base).exists():
        name, size = _base_name(base), place_size(Path(base))
        if inventory.is_taken(name):
            raise AlreadyExists(f"there is a disk '{name}' already")
        _plan_file(plan, client, found, name, Path(base).absolute())
    else:
        name, size = _check_base(inventory, inventory.disk(base))
    params: dict[str, object] = {"base_bdev": name, "split_count": parts}
    if found.size is not None:
        if found.size % _MIB or found.size * parts > size:
            raise UsageError(
                f"{parts} parts of {format_size(found.size)} are more than '{base}' has "
                f"({format_size(size)}), or no whole number of MiB"
            )
        params["split_size_mb"] = found.size // _MIB
    each = format_size(found.size if found.size is not None else size // parts)
    plan.add(
        f"split '{name}' into {parts} disks of {each}: {name}p0 to {name}p{parts - 1}",
        lambda: call(client, "bdev_split_create", params),
    )
    if carry_out(plan, found):
        _show_parts(read_inventory(client), name, found)
    return DONE


def _base_name(base: str) -> str:
    return Path(base).name.partition(".")[0] if "/" in base else base


def _check_base(inventory: Inventory, disk: Disk) -> tuple[str, int]:
    if disk.uses:
        names = ", ".join(use.controller for use in disk.uses)
        raise InUse(f"disk '{disk.name}' can't be split while controllers show it: {names}")
    if disk.snapshot or disk.claimed:
        raise InUse(
            f"disk '{disk.name}' can't be split: something stands on it already",
            hint=f"drivebay disk info {disk.name}",
        )
    return disk.bdev, disk.size


def _show_parts(inventory: Inventory, name: str, found: argparse.Namespace) -> None:
    from drivebay.cli.disk import as_json

    parts = inventory.parts_of(inventory.disk(name))
    if found.json:
        print_json([as_json(inventory, part) for part in parts])
    else:
        print("\n".join(part.name for part in parts))
