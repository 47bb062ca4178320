"""The steps that give a VM a disk or take one away, also while it runs.

Context: a short-lived process that holds the VM's lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from drivebay.disks.inventory import read_inventory
from drivebay.disks.plan import Plan
from drivebay.system.processes import unprivileged
from drivebay.vm import run
from drivebay.vm.disks import ensure_controller, plan_offer, remove_controller
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import DiskSpec
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["plan_attachment", "plan_detachment"]


def plan_attachment(plan: Plan, client: Client, vms: Vms, vm: Vm, disk: DiskSpec) -> None:
    """Give a VM one disk more; a running one sees it at once. Raises: UsageError."""
    spec = replace(vm.spec, disks=(*vm.spec.disks, disk))
    read_spec(vm.name, write_spec(spec, vm.text))  # before anything is made
    if run.running(vm) is not None:
        plan.add(
            f"show it to the running VM '{vm.name}'",
            lambda: _plug(client, vm, disk),
            lambda: _unplug(client, vm, disk),
        )
    else:
        plan_offer(plan, client, replace(vm.spec, disks=(disk,)))
    plan.add(f"write it into vm.toml of VM '{vm.name}'", lambda: vms.save(vm, spec))


def _plug(client: Client, vm: Vm, disk: DiskSpec) -> None:
    from drivebay.vm.assembly import vhost_disk
    from drivebay.vm.hotplug import plug

    identity = unprivileged()
    uid = None if identity is None else identity.uid
    socket = ensure_controller(client, vm.name, disk, read_inventory(client), uid)
    running = run.running(vm)  # it may be another QEMU than vm.toml names by now
    try:
        qemu = find_qemu(vm.spec.qemu if running is None else running.qemu)
        plug(vm, qemu, vhost_disk(vm, disk, socket))
    except BaseException:
        remove_controller(client, vm.name, disk.name, force=True)
        raise
    run.note_disk(vm, disk.name, disk)


def _unplug(client: Client, vm: Vm, disk: DiskSpec) -> None:
    from drivebay.vm.hotplug import unplug

    unplug(vm, disk.name, vm.spec.bus_of(disk))
    remove_controller(client, vm.name, disk.name, force=True)
    run.note_disk(vm, disk.name, None)


def plan_detachment(plan: Plan, client: Client, vms: Vms, vm: Vm, disk: DiskSpec) -> None:
    """Take a disk of the target from a VM; the disk itself stays."""
    spec = replace(vm.spec, disks=tuple(each for each in vm.spec.disks if each.name != disk.name))
    if run.running(vm) is not None:
        plan.add(
            f"take disk '{disk.name}' from the running VM '{vm.name}'",
            lambda: _unplug(client, vm, disk),
        )
    else:
        plan.add(
            f"take away the socket of disk '{disk.name}'",
            lambda: remove_controller(client, vm.name, disk.name),
        )
    plan.add(f"strike it from vm.toml of VM '{vm.name}'", lambda: vms.save(vm, spec))
