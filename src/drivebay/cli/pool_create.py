"""The steps that make a pool: in a sparse file, on a new partition, or on an empty one.

Context: a short-lived process. Planning only looks; each step can be taken back, so a pool
that cannot be made leaves neither a file nor a partition behind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.cli.connection import call
from drivebay.cli.output import format_size
from drivebay.cli.places import (
    check_visible,
    contents_of,
    data_folder,
    default_pool_size,
    holds_data,
    make_sparse_file,
    opened,
    place_size,
    remove_file,
    resize_file,
)
from drivebay.cli.steps import Plan
from drivebay.errors import InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.cli.block_device import BlockDevice
    from drivebay.rpc.client import Client

__all__ = ["DEFAULT_POOL", "plan_default_pool", "plan_device_pool", "plan_file_pool"]

DEFAULT_POOL: Final = "default"
_SMALLEST: Final = 64 << 20


def plan_default_pool(plan: Plan, client: Client, socket: str) -> None:
    """The pool of those who never made one. Raises: StateError when nothing is left for it."""
    place = data_folder() / "pools" / f"{DEFAULT_POOL}.img"
    size = default_pool_size(place)
    if size < _SMALLEST:
        raise StateError(
            f"the file system of '{place.parent}' has no room for a pool",
            hint="make one elsewhere: drivebay pool create NAME --file FILE --size SIZE",
        )
    plan_file_pool(plan, client, DEFAULT_POOL, place, size, socket)


def plan_file_pool(
    plan: Plan, client: Client, name: str, place: Path, size: int | None, socket: str
) -> None:
    """A pool in a file: one that is made, or one that is there and was never written."""
    if os.path.lexists(place):
        _plan_present_file(plan, place, size, socket)
    else:
        if size is None:
            raise UsageError(f"there is no file '{place}' yet", hint="add --size, such as 300G")
        wanted = size
        plan.add(
            f"make the file '{place}' of {format_size(wanted)}, which takes up what is used of it",
            lambda: make_sparse_file(place, wanted, socket),
            lambda: remove_file(place),
        )
    if size is not None and size < _SMALLEST:
        raise UsageError(
            f"{format_size(size)} is too small for a pool: at least {format_size(_SMALLEST)}"
        )
    _plan_store(plan, client, name, str(place))


def _plan_present_file(plan: Plan, place: Path, size: int | None, socket: str) -> None:
    from drivebay.cli.connection import target_owner

    if not place.is_file():
        raise UsageError(
            f"'{place}' is no file", hint="for a pool on a disk or partition: --device"
        )
    found = ", ".join(map(str, contents_of(place)))
    if found or holds_data(place):
        raise InUse(
            f"the file '{place}' is not empty: it holds {found or 'data'}",
            hint="name another file; a pool in a file opens again with: drivebay rpc "
            'bdev_aio_create \'{"name": …, "filename": …}\'',
        )
    check_visible(place, target_owner(socket)[0])
    before = place_size(place)
    if size is not None and size != before:
        plan.add(
            f"make the file '{place}' {format_size(size)} long, sparse",
            lambda: resize_file(place, size),
            lambda: resize_file(place, before),
        )


def plan_device_pool(plan: Plan, client: Client, name: str, path: str, size: int | None) -> str:
    """A pool on a new partition of a disk, or on an empty partition; returns the question."""
    from drivebay.cli.block_device import find_device

    device = find_device(path)
    if device.read_only:
        raise StateError(f"{device} is read-only")
    plan.facts.append(f"{device}, {format_size(device.size)}")
    if device.is_partition:
        return _plan_partition(plan, client, name, device, size)
    from drivebay.cli.partition import plan_partition, remove_partition, write_partition

    blocks = device.size // device.block_bytes
    with opened(Path(device.path)) as descriptor:
        new = plan_partition(
            lambda offset, length: os.pread(descriptor, length, offset),
            device.path,
            blocks,
            device.block_bytes,
            name,
            size,
        )
    if new.before is None and device.holders:
        raise InUse(f"{device} is in use: {'; '.join(device.holders)}")
    plan.facts += [f"  {there}" for there in new.holds] or ["  it is empty"]
    plan.facts += [f"  {holder}" for holder in device.holders]
    made: list[str] = []
    plan.add(
        f"make partition {new.entry.number} of {format_size(new.size)} at "
        f"{format_size(new.offset)}, and touch nothing else on {device.path}",
        lambda: made.append(write_partition(new)),
        lambda: remove_partition(new),
    )
    _plan_store(plan, client, name, None, made)
    return f"Make this partition on {device}?"


def _plan_partition(
    plan: Plan, client: Client, name: str, device: BlockDevice, size: int | None
) -> str:
    place = Path(device.path)
    if size is not None:
        raise UsageError(f"{device} is a partition: the pool takes all of it; leave --size out")
    if device.holders:
        raise InUse(f"{device} is in use: {'; '.join(device.holders)}")
    found = ", ".join(map(str, contents_of(place)))
    if found or holds_data(place):
        raise InUse(
            f"{device} is not empty: it holds {found or 'data that is not recognized'}",
            hint="if nobody needs that: wipefs --all, then blkdiscard -z or dd if=/dev/zero",
        )
    plan.facts.append("  it is empty")
    _plan_store(plan, client, name, _stable_path(place))
    return f"Make a pool on all of {device}?"


def _stable_path(place: Path) -> str:
    """The link by the partition's GUID, which survives a new order of disks."""
    folder = Path("/dev/disk/by-partuuid")
    if folder.is_dir():
        for link in sorted(folder.iterdir()):
            if link.resolve() == place.resolve():
                return str(link)
    return str(place.resolve())


def _plan_store(
    plan: Plan, client: Client, name: str, place: str | None, made: list[str] | None = None
) -> None:
    """The bdev and the store on it; ``made`` gives the place when an earlier step finds it."""
    bdev = f"pool-{name}"
    where = f"'{place}'" if place is not None else "the new partition"

    def open_base() -> None:
        filename = place if place is not None else (made or [""])[0]
        call(client, "bdev_aio_create", {"name": bdev, "filename": filename})
        call(client, "bdev_wait_for_examine")

    plan.add(
        f"open {where} as the bdev '{bdev}'",
        open_base,
        lambda: call(client, "bdev_aio_delete", {"name": bdev}),
    )
    plan.add(
        f"make pool '{name}' in it",
        lambda: call(client, "bdev_lvol_create_lvstore", {"bdev_name": bdev, "lvs_name": name}),
    )
