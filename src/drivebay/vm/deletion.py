"""The steps that delete a VM with the disks that were made for it, and nothing else.

Context: a short-lived process that holds the VM's lock.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from drivebay.disks.inventory import read_inventory
from drivebay.disks.plan import Plan
from drivebay.errors import DrivebayError
from drivebay.vm import run
from drivebay.vm.disks import plan_closing_of_image, plan_deletion, remove_controller
from drivebay.vm.images.store import Images
from drivebay.vm.joining import plan_downscripts
from drivebay.vm.nets import plan_leaving
from drivebay.vm.spec import DiskSpec
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["plan_vm_deletion"]


def plan_vm_deletion(
    plan: Plan, client: Client | None, vms: Vms, vm: Vm, *, keep_disks: bool = False
) -> None:
    """End a VM by force if it runs, and delete it. A VM without disks needs no target.

    Raises: InUse when something else stands on its disks.
    """
    running = run.running(vm)
    if running is not None:
        plan.add(f"end VM '{vm.name}' by force", lambda: run.end_by_force(vm, running))
    plan_downscripts(plan, vm)
    plan_leaving(plan, vm.name)
    if client is not None:
        _plan_disks(plan, client, vms, vm, keep_disks=keep_disks)
    plan.add(f"delete the folder '{vm.folder}'", lambda: vms.delete(vm))


def _plan_disks(plan: Plan, client: Client, vms: Vms, vm: Vm, *, keep_disks: bool) -> None:
    others = vms.others(vm.name)
    inventory = read_inventory(client)
    for disk in vm.spec.disks:
        if disk.bdev is None:
            continue  # an overlay goes with the folder
        _plan_removal(plan, client, vm, disk)
        why = _why_it_stays(disk, others) or ("is to be kept" if keep_disks else None)
        if why is not None:
            plan.facts.append(f"its disk '{disk.name}' ('{disk.bdev}') {why}, and stays")
        else:
            plan_deletion(plan, client, inventory, vm.name, disk)
    if vm.spec.image is not None and not keep_disks:
        with contextlib.suppress(DrivebayError):  # an image that is gone or broken is nobody's
            plan_closing_of_image(plan, client, Images().get(vm.spec.image))


def _why_it_stays(disk: DiskSpec, others: list[Vm]) -> str | None:
    if not disk.made:
        return "was not made for it"
    if disk.shared:
        return "is shared"
    for other in others:  # a folder that was copied
        if any(held.bdev == disk.bdev for held in other.spec.disks):
            return f"is that of VM '{other.name}', too"
    return None


def _plan_removal(plan: Plan, client: Client, vm: Vm, disk: DiskSpec) -> None:
    plan.add(
        f"take away the socket of disk '{disk.name}'",
        lambda: remove_controller(client, vm.name, disk.name, force=True),
    )
