"""The steps that make a pool: on a new partition of a disk, or on an empty one.

Context: a short-lived process. Planning only looks; each step can be taken back, so a pool
that cannot be made leaves no partition behind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.disks.places import (
    contents_of,
    holds_data,
    opened,
)
from drivebay.disks.plan import Plan
from drivebay.disks.pools import plan_store
from drivebay.disks.sizes import format_size
from drivebay.errors import InUse, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.disks.block_device import BlockDevice
    from drivebay.rpc.client import Client

__all__ = ["plan_device_pool"]


def plan_device_pool(plan: Plan, client: Client, name: str, path: str, size: int | None) -> str:
    """A pool on a new partition of a disk, or on an empty partition; returns the question."""
    from drivebay.disks.block_device import find_device

    device = find_device(path)
    if device.read_only:
        raise StateError(f"{device} is read-only")
    plan.facts.append(f"{device}, {format_size(device.size)}")
    if device.is_partition:
        return _plan_partition(plan, client, name, device, size)
    from drivebay.disks.partition import plan_partition, remove_partition, write_partition

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
    plan_store(plan, client, name, None, made)
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
    plan_store(plan, client, name, _stable_path(place))
    return f"Make a pool on all of {device}?"


def _stable_path(place: Path) -> str:
    """The link by the partition's GUID, which survives a new order of disks."""
    folder = Path("/dev/disk/by-partuuid")
    if folder.is_dir():
        for link in sorted(folder.iterdir()):
            if link.resolve() == place.resolve():
                return str(link)
    return str(place.resolve())
