"""How the things of a lab go: by `down --delete`, by `up --prune`, and to be made anew.

Context: a short-lived process that holds the lab's lock. What goes is what the record says that
this lab made; a thing that is gone already is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from drivebay.disks.connection import call
from drivebay.disks.deleting import plan_disk_deletion, plan_pool_deletion, refuse_shown
from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.places import remove_file
from drivebay.disks.plan import Plan
from drivebay.errors import InUse
from drivebay.vm.deletion import plan_vm_deletion
from drivebay.vm.lab.disks import there_is
from drivebay.vm.lab.model import network_name
from drivebay.vm.lab.networks import remove_network
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Site
from drivebay.vm.lab.vms import remove_half_made

__all__ = ["in_removal_order", "name_of", "remover", "words_of"]

_ORDER = ("vm", "network", "parts", "disk", "pool")


def in_removal_order(things: Iterable[Thing]) -> list[Thing]:
    """What stands on others before them; of parts of parts, the latest first."""
    newest_first = list(things)[::-1]
    return sorted(newest_first, key=lambda thing: _ORDER.index(thing.kind))


def name_of(site: Site, thing: Thing) -> str:
    """What a thing is, and what it is called."""
    match thing.kind:
        case "vm":
            return f"VM '{site.full(thing.name)}'"
        case "parts":
            return f"the parts '{thing.name}' of disk '{thing.bdev}'"
        case "network":
            return f"network '{network_name(site.name, thing.name)}'"
        case "disk":
            return f"disk '{thing.bdev}'"
        case _:
            return f"pool '{site.full(thing.name)}'"


def words_of(site: Site, thing: Thing) -> str:
    """The step that removes a thing, with all that goes with it."""
    if thing.kind == "parts":
        return f"join {name_of(site, thing)}"
    disk = f" and its disk '{thing.bdev}'" if thing.kind == "vm" and thing.bdev else ""
    file = f" and the file '{thing.file}'" if thing.made_file else ""
    return f"delete {name_of(site, thing)}{disk}{file}"


def remover(site: Site, thing: Thing) -> Callable[[], object]:
    """What removes a thing, and then strikes it from the record."""
    remove = {
        "vm": _remove_vm,
        "network": remove_network,
        "parts": _remove_parts,
        "disk": _remove_disk,
        "pool": _remove_pool,
    }[thing.kind]

    def act() -> None:
        remove(site, thing)
        site.record.forget(thing.kind, thing.name)

    return act


def _remove_vm(site: Site, thing: Thing) -> None:
    full = site.full(thing.name)
    if full not in site.vms.names():
        if not thing.finished:
            remove_half_made(site, thing)
        return
    with site.vms.locked(full):
        vm = site.vms.load(full)
        if vm.spec.lab != site.name:
            return  # somebody has made another one of that name
        plan = Plan()
        plan_vm_deletion(plan, site.client, site.vms, vm)
        plan.run()


def _remove_parts(site: Site, thing: Thing) -> None:
    inventory = site.inventory()
    whole = there_is(inventory, thing.bdev) or _by_bdev(inventory, thing.bdev)
    if whole is None or not inventory.parts_of(whole):
        return
    for part in inventory.parts_of(whole):
        _withdraw(site, part)
    call(site.client, "bdev_split_delete", {"base_bdev": whole.bdev})


def _by_bdev(inventory: Inventory, bdev: str) -> Disk | None:
    return next((disk for disk in inventory.volumes if disk.bdev == bdev), None)


def _remove_disk(site: Site, thing: Thing) -> None:
    disk = there_is(site.inventory(), thing.bdev)
    if disk is not None:
        _withdraw(site, disk)
        inventory = site.inventory()
        plan = Plan()
        plan_disk_deletion(
            plan, site.client, inventory, inventory.disk(disk.reference), with_snapshots=True
        )
        plan.run()
    if thing.made_file:
        remove_file(Path(thing.file))


def _withdraw(site: Site, disk: Disk) -> None:
    """Take a disk's sockets away that were made for this lab's VMs. Raises: InUse."""
    for use in disk.uses:
        if use.sessions:
            raise InUse(
                f"a machine is connected to disk '{disk.name}' by '{use.controller}'",
                hint=f"drivebay down {site.record.file}",
            )
        words = use.controller.split(".")
        if len(words) == 3 and words[0] == "vm" and _is_ours(site, words[1]):
            call(site.client, "vhost_delete_controller", {"ctrlr": use.controller})


def _is_ours(site: Site, vm: str) -> bool:
    return vm in site.vms.names() and site.vms.load(vm).spec.lab == site.name


def _remove_pool(site: Site, thing: Thing) -> None:
    full = site.full(thing.name)
    inventory = site.inventory()
    pool = next((each for each in inventory.pools if each.name == full), None)
    if pool is not None:
        foreign = [disk.name for disk in inventory.volumes if disk.pool == full]
        if foreign:
            raise InUse(
                f"pool '{full}' holds what this lab did not make: {', '.join(foreign)}",
                hint=f"delete or copy it first: drivebay disk delete {full}/{foreign[0]}",
            )
        refuse_shown(inventory, pool)
        plan = Plan()
        plan_pool_deletion(plan, site.client, inventory, pool, keep_file=True)
        plan.run()
    elif _by_bdev(inventory, f"pool-{full}") is not None:
        call(site.client, "bdev_aio_delete", {"name": f"pool-{full}"})
    if thing.made_file:
        remove_file(Path(thing.file))
