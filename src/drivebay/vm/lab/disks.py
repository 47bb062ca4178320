"""The disks of a lab: in its pools, on files, and as parts of others; made and made larger.

Context: a short-lived process that holds the lab's lock.
"""

from __future__ import annotations

import os
from pathlib import Path

from drivebay.disks.growing import plan_disk_size
from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.making import check_base, plan_file_disk, plan_parts
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, NotFound
from drivebay.vm.disks import check_volume_free, plan_empty_disk
from drivebay.vm.lab.model import LabDisk
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Up, told_at, would_lose

__all__ = ["in_order", "part_of", "plan_disk", "plan_growth", "reference_of", "there_is"]


def in_order(disks: tuple[LabDisk, ...]) -> list[LabDisk]:
    """A disk before its parts."""
    by_name = {disk.name: disk for disk in disks}

    def depth(disk: LabDisk) -> int:
        return 0 if disk.base is None else 1 + depth(by_name[disk.base])

    return sorted(disks, key=depth)


def reference_of(up: Up, inventory: Inventory, disk: LabDisk) -> str | None:
    """A disk's name for the target; None of parts whose whole is not there yet."""
    if disk.base is None:
        full = up.site.full(disk.name)
        return full if disk.file is not None else f"{up.pool_name(disk.pool)}/{full}"
    base = reference_of(up, inventory, up.lab.disk(disk.base))
    whole = None if base is None else there_is(inventory, base)
    if whole is not None:
        return f"{whole.bdev}p{disk.part}"
    made = up.thing("parts", disk.group)  # the target may have lost it, and gets it again
    return None if made is None else f"{made.bdev}p{disk.part}"


def there_is(inventory: Inventory, reference: str) -> Disk | None:
    """The disk of exactly that reference."""
    return next((disk for disk in inventory.volumes if disk.reference == reference), None)


def part_of(thing: Thing, bdev: str) -> bool:
    """Whether a bdev is one of the parts that a record of parts means."""
    return bdev.startswith(f"{thing.bdev}p") and bdev.removeprefix(f"{thing.bdev}p").isdigit()


def plan_disk(up: Up, disk: LabDisk) -> None:
    """Plan what makes a disk as the file says. Raises: what would make that impossible."""
    with told_at(up.lab.source, disk.place):
        if disk.base is not None:
            if disk.part == 0:
                _plan_parts(up, disk)
            return
        reference = reference_of(up, up.inventory, disk)
        assert reference is not None
        thing = _present(up, disk, up.thing("disk", disk.name), reference)
        there = there_is(up.inventory, reference)
        if there is not None and thing is None:
            raise AlreadyExists(
                f"there is a disk '{reference}' already, and this lab did not make it",
                hint='another name for the lab: name = "…"',
            )
        if there is not None and thing is not None:
            _compare(up, disk, there, thing)
        elif disk.file is not None and thing is not None and thing.finished:
            _plan_opening(up, disk, thing)
        elif thing is not None and thing.finished and not _has_pool(up, disk):
            return  # it comes back with its pool, of which the target has lost its configuration
        else:
            if thing is None:
                _check(up, disk)
            up.add(_words(up, disk), lambda: _make(up, disk))


def _has_pool(up: Up, disk: LabDisk) -> bool:
    return any(pool.name == up.pool_name(disk.pool) for pool in up.inventory.pools)


def _words(up: Up, disk: LabDisk) -> str:
    size = "" if disk.size is None else f" of {format_size(disk.size)}"
    where = f"on '{disk.file}'" if disk.file is not None else f"in pool '{up.pool_name(disk.pool)}'"
    return f"make disk '{up.site.full(disk.name)}'{size} {where}"


def _present(up: Up, disk: LabDisk, thing: Thing | None, reference: str) -> Thing | None:
    """What the record has under that name; it may lie elsewhere than the file says now."""
    place = "" if disk.file is None else str(disk.file)
    if thing is None or (thing.file == place and (place or thing.bdev == reference)):
        return thing
    if there_is(up.inventory, thing.bdev) or (thing.file and Path(thing.file).exists()):
        raise would_lose(
            f"disk '{disk.name}' lies on '{thing.file or thing.bdev}', and the file says "
            f"'{place or reference}'",
            disk.name,
        )
    return None


def _check(up: Up, disk: LabDisk) -> None:
    """Look whether it could be made, before anything else is."""
    full = up.site.full(disk.name)
    if disk.file is None:
        check_volume_free(up.inventory, up.pool_name(disk.pool), full)
        return
    if up.inventory.is_taken(full):
        raise AlreadyExists(f"there is a disk '{full}' already, and this lab did not make it")
    if ("disk", disk.name) not in up.doomed:  # its file is there still
        plan_file_disk(Plan(), up.site.client, full, disk.file, disk.size, up.site.socket)


def _make(up: Up, disk: LabDisk) -> None:
    site = up.site
    inventory = site.inventory()
    full = site.full(disk.name)
    begun = site.record.find("disk", disk.name)
    reference = reference_of(up, inventory, disk)
    assert reference is not None
    if begun is not None and there_is(inventory, reference) is not None:
        site.record.finish(begun)  # an `up` was killed just then
        return
    plan = Plan()
    thing = Thing("disk", disk.name, bdev=reference)
    if disk.file is None:
        assert disk.size is not None
        pool = up.pool_name(disk.pool)
        plan_empty_disk(plan, site.client, inventory, pool, full, disk.size)
    else:
        if begun is not None:
            begun.remove_unwritten_file()
        made = not os.path.lexists(disk.file)
        thing = Thing("disk", disk.name, reference, str(disk.file), made)
        plan_file_disk(plan, site.client, full, disk.file, disk.size, site.socket)
    site.make(thing, plan)


def _plan_opening(up: Up, disk: LabDisk, thing: Thing) -> None:
    """The target has lost its configuration; the file is there still."""
    path = Path(thing.file)
    full = up.site.full(disk.name)
    if not path.exists():
        raise NotFound(
            f"disk '{full}' was made on '{path}', which is not there any more",
            hint=f"bring it back (is it mounted?); or begin anew: --recreate {disk.name}",
        )
    up.carry_out_later(
        f"open '{path}' as the disk '{full}' again",
        lambda plan: plan_file_disk(
            plan, up.site.client, full, path, None, up.site.socket, use_existing=True
        ),
    )


def _compare(up: Up, disk: LabDisk, there: Disk, thing: Thing) -> None:
    if not thing.finished:
        up.settled.append(thing)
    if disk.size is not None:
        plan_growth(up, disk.name, there, disk.size)


def plan_growth(up: Up, name: str, there: Disk, size: int) -> None:
    """Make a disk as large as the file says. Raises: StateError when it would become smaller.

    A pool gives whole clusters, so that a disk may be larger than it was wished.
    """
    step = 1
    if there.pool is not None:
        step = up.inventory.pool(there.pool).cluster_bytes
    if -(-size // step) * step < there.size:
        raise would_lose(
            f"disk '{there.name}' is {format_size(there.size)} large, and can't become "
            f"{format_size(size)}",
            name,
        )
    if size > there.size:
        up.carry_out_later(
            f"make disk '{there.name}' {format_size(size)} large (now {format_size(there.size)})",
            lambda plan: plan_disk_size(plan, up.site.client, there, size),
        )


# ---- parts --------------------------------------------------------------------------------------


def _plan_parts(up: Up, first: LabDisk) -> None:
    thing = up.thing("parts", first.group)
    assert first.base is not None
    reference = reference_of(up, up.inventory, up.lab.disk(first.base))
    base = None if reference is None else there_is(up.inventory, reference)
    there = [] if base is None else up.inventory.parts_of(base)
    if thing is not None and base is not None and thing.bdev != base.bdev:
        raise would_lose(f"'{first.group}' are parts of '{thing.bdev}'", first.group)
    if there and thing is None:
        raise AlreadyExists(f"the disk '{first.base}' is split already, and not by this lab")
    if there and thing is not None:
        if not thing.finished:
            up.settled.append(thing)
        _compare_parts(first, there)
        return
    if base is not None and thing is None and ("parts", first.group) not in up.doomed:
        check_base(base)
    up.add(
        f"split disk '{up.site.full(first.base)}' into {first.parts} parts",
        lambda: _split(up, first),
    )


def _compare_parts(first: LabDisk, there: list[Disk]) -> None:
    if len(there) != first.parts:
        raise would_lose(
            f"'{first.group}' are {len(there)} parts, and the file says {first.parts}", first.group
        )
    if first.size is not None and there[0].size != first.size:
        raise would_lose(
            f"the parts '{first.group}' have {format_size(there[0].size)} each, and the file says "
            f"{format_size(first.size)}",
            first.group,
        )


def _split(up: Up, first: LabDisk) -> None:
    assert first.base is not None
    inventory = up.site.inventory()
    reference = reference_of(up, inventory, up.lab.disk(first.base))
    base = None if reference is None else there_is(inventory, reference)
    if base is None:
        raise NotFound(f"there is no disk '{first.base}', which is to be split")
    begun = up.site.record.find("parts", first.group)
    if begun is not None and inventory.parts_of(base):
        up.site.record.finish(begun)
        return
    check_base(base)
    plan = Plan()
    plan_parts(plan, up.site.client, base.bdev, base.size, first.parts, first.size)
    up.site.make(Thing("parts", first.group, bdev=base.bdev), plan)
