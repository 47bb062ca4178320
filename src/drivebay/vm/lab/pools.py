"""The pools of a lab: made, made larger, opened again.

Context: a short-lived process that holds the lab's lock.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from drivebay.disks.block_device import find_device
from drivebay.disks.connection import call
from drivebay.disks.device_pool import plan_device_pool
from drivebay.disks.growing import plan_pool_growth
from drivebay.disks.inventory import Pool
from drivebay.disks.places import place_size
from drivebay.disks.plan import Plan
from drivebay.disks.pools import DEFAULT_POOL, plan_default_pool, plan_file_pool
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, NotFound, StateError
from drivebay.vm.lab.model import LabPool
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Site, Up, told_at, would_lose

__all__ = ["plan_default", "plan_pool", "pool_there"]


def plan_pool(up: Up, pool: LabPool) -> None:
    """Plan what makes a pool as the file says. Raises: what would make that impossible."""
    with told_at(up.lab.source, pool.place):
        there = pool_there(up, pool.name)
        thing = up.thing("pool", pool.name)
        full = up.site.full(pool.name)
        if there is not None and thing is None:
            raise AlreadyExists(
                f"there is a pool '{full}' already, and this lab did not make it",
                hint='another name for the lab: name = "…"',
            )
        if there is not None and thing is not None:
            _compare(up, pool, there, thing)
        elif thing is not None and thing.finished:
            _plan_opening(up, pool, thing)
        else:
            # A file that goes is there still; beside a partition, which stays, has to be room.
            if thing is None and (pool.device or ("pool", pool.name) not in up.doomed):
                _check(up, pool)
            where = pool.file or pool.device
            size = "" if pool.size is None else f" of {format_size(pool.size)}"
            up.add(f"make pool '{full}'{size} on '{where}'", lambda: _make(up, pool))


def plan_default(up: Up) -> None:
    """The pool of those who name none, which is no lab's; made if it is not there."""
    site = up.site

    def fill(plan: Plan) -> None:
        if _is_open(site, DEFAULT_POOL):
            _plan_rest(site, plan, DEFAULT_POOL)
        else:
            plan_default_pool(plan, site.client, site.socket)

    if not any(pool.name == DEFAULT_POOL for pool in up.inventory.pools):
        up.carry_out_later(f"make pool '{DEFAULT_POOL}'", fill)


def pool_there(up: Up, name: str) -> Pool | None:
    """The lab's pool of that name in the target, if it is there and stays."""
    full = up.site.full(name)
    return next((pool for pool in up.inventory.pools if pool.name == full), None)


def _check(up: Up, pool: LabPool) -> None:
    """Look whether it could be made, before anything else is."""
    plan = Plan()
    question = _plan_making(up.site, plan, pool)
    up.question = up.question or question
    up.plan.facts += plan.facts


def _plan_making(site: Site, plan: Plan, pool: LabPool) -> str | None:
    full = site.full(pool.name)
    if pool.device is not None:
        return plan_device_pool(plan, site.client, full, pool.device, pool.size)
    assert pool.file is not None
    plan_file_pool(plan, site.client, full, pool.file, pool.size, site.socket)
    return None


def _make(up: Up, pool: LabPool) -> None:
    site = up.site
    full = site.full(pool.name)
    begun = site.record.find("pool", pool.name)
    plan = Plan()
    thing = Thing("pool", pool.name)
    if begun is not None and _is_open(site, full):
        thing = begun
        _plan_rest(site, plan, full)
    else:
        if begun is not None:
            begun.remove_unwritten_file()
        if pool.file is not None:
            made = not os.path.lexists(pool.file)
            thing = Thing("pool", pool.name, file=str(pool.file), made_file=made)
        _plan_making(site, plan, pool)
    site.make(thing, plan)
    place = next(each.place for each in site.inventory().pools if each.name == full)
    site.record.finish(replace(thing, file=place or ""))  # of a device: its partition


def _is_open(site: Site, full: str) -> bool:
    return any(volume.bdev == f"pool-{full}" for volume in site.inventory().volumes)


def _plan_rest(site: Site, plan: Plan, full: str) -> None:
    """An `up` was killed when the bdev was open already: only the pool on it may be missing."""
    call(site.client, "bdev_wait_for_examine")
    if not any(pool.name == full for pool in site.inventory().pools):
        plan.add(
            f"make pool '{full}'",
            lambda: call(
                site.client,
                "bdev_lvol_create_lvstore",
                {"bdev_name": f"pool-{full}", "lvs_name": full},
            ),
        )


def _plan_opening(up: Up, pool: LabPool, thing: Thing) -> None:
    """The target has lost its configuration; the pool is in its file still."""
    full = up.site.full(pool.name)
    if not thing.file or not Path(thing.file).exists():
        raise NotFound(
            f"pool '{full}' was made on '{thing.file or pool.device}', which is not there any more",
            hint=f"bring it back (is it mounted?); or begin anew: --recreate {pool.name}",
        )

    def reopen() -> None:
        client = up.site.client
        call(client, "bdev_aio_create", {"name": f"pool-{full}", "filename": thing.file})
        call(client, "bdev_wait_for_examine")
        if not any(each.name == full for each in up.site.inventory().pools):
            call(client, "bdev_aio_delete", {"name": f"pool-{full}"})
            raise NotFound(
                f"'{thing.file}' holds no pool '{full}' any more",
                hint=f"begin anew, if nothing on it is needed: --recreate {pool.name}",
            )

    up.add(f"open pool '{full}' on '{thing.file}' again", reopen)


def _compare(up: Up, pool: LabPool, there: Pool, thing: Thing) -> None:
    site = up.site
    if not thing.finished:
        up.settled.append(thing)
    place = None if there.place is None else Path(there.place)
    if pool.file is not None and (place is None or place.resolve() != pool.file.resolve()):
        raise would_lose(
            f"pool '{there.name}' lies on '{there.place}', and the file says '{pool.file}'",
            pool.name,
        )
    if pool.size is None or place is None:
        return
    now = place_size(place) if pool.device is None else find_device(str(place)).size
    if pool.device is not None and pool.size != now:
        raise StateError(
            f"pool '{there.name}' lies on '{place}', which is {format_size(now)} large, and 'up' "
            f"gives no partition another size: {format_size(pool.size)}",
            hint="put the old value back; or, if what is on it may be lost: drivebay down "
            "--delete, then delete that partition",
        )
    if pool.size < now:
        raise would_lose(
            f"pool '{there.name}' is {format_size(now)} large, and can't become "
            f"{format_size(pool.size)}",
            pool.name,
        )
    if pool.size > now:
        size = pool.size
        up.carry_out_later(
            f"make pool '{there.name}' {format_size(size)} large (now {format_size(now)})",
            lambda plan: plan_pool_growth(plan, site.client, there, size),
        )
