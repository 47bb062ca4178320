"""`drivebay vm set|attach|detach|delete`: what a VM is made of, changed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import carry_out
from drivebay.cli.vm_vnc import read_vnc
from drivebay.cli.vm_words import (
    read_cloud_init,
    read_disk,
    read_interfaces,
    read_iso,
    read_qemu,
    read_shares,
    said_of_guest,
)
from drivebay.disks.connection import find_socket
from drivebay.disks.inventory import read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.starting import connect_or_start
from drivebay.errors import InUse, NotFound, UsageError
from drivebay.vm import run
from drivebay.vm.attaching import plan_attachment, plan_detachment
from drivebay.vm.creation import plan_disk
from drivebay.vm.deletion import plan_vm_deletion
from drivebay.vm.disks import (
    SHARING_WARNING,
    check_writers,
    inventory_when_let_go,
)
from drivebay.vm.iso import check_iso
from drivebay.vm.nets import choose_nets, plan_leaving, plan_places
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import NetSpec, VmSpec
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    pass

__all__ = ["attach", "change", "delete", "detach"]


# ---- set ----------------------------------------------------------------------------------------


def change(found: argparse.Namespace) -> int:
    """Change vm.toml as if a person had edited it."""
    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        spec = _changed(vms, vm.spec, found)
        if spec == vm.spec:
            raise UsageError("nothing to change", hint=f"drivebay vm set {vm.name} --help")
        read_spec(vm.name, write_spec(spec, vm.text))
        plan = Plan()
        if spec.nets != vm.spec.nets:
            plan_places(plan, vm.name, spec.nets)
        plan.add(f"change vm.toml of VM '{vm.name}'", lambda: vms.save(vm, spec))
        if spec.nets != vm.spec.nets and run.running(vm) is None:
            plan_leaving(plan, vm.name, spec.nets)  # of one that runs, its next start does it
        if not carry_out(plan, found):
            return DONE
        vm = vms.load(found.name)
    running = run.running(vm)
    if found.json:
        from drivebay.cli.vm_show import as_json

        print_json(as_json(vm))
    elif running is None:
        print(f"VM '{vm.name}' is changed")
    else:
        from drivebay.cli.vm_show import pending

        print(f"VM '{vm.name}' runs on as it was started; waiting for its next start:")
        for line in pending(vm, running):
            print(f"  {line}")
        print(f"  restart it: drivebay vm restart {vm.name}")
    return DONE


def _changed(vms: Vms, spec: VmSpec, found: argparse.Namespace) -> VmSpec:
    if found.memory is not None:
        spec = replace(spec, memory=found.memory)
    if found.cpus is not None:
        spec = replace(spec, cpus=found.cpus)
    if found.qemu is not None:
        find_qemu(found.qemu)
        spec = replace(spec, qemu=read_qemu(found.qemu))
    if found.iso is not None:
        iso = read_iso(found.iso)
        if iso is not None:
            check_iso(iso)
        spec = replace(spec, iso=None if iso is None else str(iso))
    spec = replace(spec, vnc=read_vnc(found, spec.vnc, vms.others(spec.name)))
    if found.machine is not None:
        spec = replace(spec, machine=found.machine)
    if found.share is not None:
        spec = replace(spec, shares=read_shares(found.share))
    said_of_nets = (found.net, found.forward, found.address, found.gateway, found.dns)
    if any(value is not None for value in said_of_nets):
        spec = replace(spec, nets=_changed_nets(vms, spec, found))
    said = said_of_guest(found)
    if said:
        if spec.cloud_init is None:
            raise UsageError(f"{', '.join(said)}: only cloud-init can do that, and VM "
                             f"'{spec.name}' has none")  # fmt: skip
        from drivebay.vm.seed import check_cloud_init

        cloud_init = read_cloud_init(found, spec.cloud_init)
        check_cloud_init(cloud_init)
        spec = replace(spec, cloud_init=cloud_init)
    return spec


def _changed_nets(vms: Vms, spec: VmSpec, found: argparse.Namespace) -> tuple[NetSpec, ...]:
    """--net replaces all interfaces, each other option changes one."""
    if found.net is None and not spec.nets:
        raise UsageError(f"VM '{spec.name}' has no network", hint="add --net user")
    from drivebay.vm.seed import check_net

    wished = read_interfaces(found, spec.nets)
    others = vms.others(spec.name)
    nets = choose_nets(vms, spec.name, wished, others, spec.nets, ssh=found.net is not None)
    for net in nets:
        check_net(net)
    return nets


# ---- attach and detach --------------------------------------------------------------------------


def attach(found: argparse.Namespace) -> int:
    """Give a VM one disk more; a running one sees it at once."""
    if len(found.disk) != 1:
        raise UsageError("attach one disk at a time")
    wish = read_disk(found.disk[0])
    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        if wish.name is None:
            wish = replace(wish, name=_free_name(vm.spec))
        if vm.spec.disk(wish.name or "") is not None:
            raise UsageError(f"VM '{vm.name}' has a disk '{wish.name}' already")
        with connect_or_start(found.socket) as client:
            inventory = read_inventory(client)
            plan = Plan()
            disk = plan_disk(plan, client, inventory, vm.name, wish, find_socket(found.socket))
            plan_attachment(plan, client, vms, vm, disk)
            if not disk.made:
                check_writers(vm.name, disk, inventory, [*vms.others(vm.name), vm])
            if not carry_out(plan, found):
                return DONE
    if disk.shared:
        print_warning(SHARING_WARNING)
    if found.json:
        print_json({"name": vm.name, "disk": disk.name, "bdev": disk.bdev})
    else:
        print(f"VM '{vm.name}' has the disk '{disk.name}' ({disk.bdev})")
        print(f"  in its guest: /dev/disk/by-id/…{disk.name}")
    return DONE


def _free_name(spec: VmSpec) -> str:
    number = 1
    while spec.disk(f"disk{number}") is not None:
        number += 1
    return f"disk{number}"


def detach(found: argparse.Namespace) -> int:
    """Take a disk from a VM; the disk itself stays."""
    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        disk = vm.spec.disk(found.disk)
        if disk is None:
            names = ", ".join(each.name for each in vm.spec.disks)
            raise NotFound(f"VM '{vm.name}' has no disk '{found.disk[:80]}'",
                           hint=f"it has: {names}" if names else None)  # fmt: skip
        if disk.bdev is None:
            raise UsageError(
                f"the overlay '{disk.name}' is a file of VM '{vm.name}', and stays with it"
            )
        with connect_or_start(found.socket) as client:
            plan = Plan()
            plan_detachment(plan, client, vms, vm, disk)
            if not carry_out(plan, found):
                return DONE
    if found.json:
        print_json({"name": vm.name, "disk": disk.name, "bdev": disk.bdev})
    else:
        print(f"VM '{vm.name}' has the disk '{disk.name}' no more; '{disk.bdev}' is still there")
        if disk.made:
            print(f"  delete it: drivebay disk delete {disk.bdev}")
    return DONE


# ---- delete -------------------------------------------------------------------------------------


def delete(found: argparse.Namespace) -> int:
    """Delete a VM with what was made for it, and nothing else."""
    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        running = run.running(vm)
        if running is not None and not found.force:
            raise InUse(
                f"VM '{vm.name}' runs", hint=f"drivebay vm stop {vm.name} first, or add --force"
            )
        plan = Plan()
        if not any(disk.bdev is not None for disk in vm.spec.disks):
            plan_vm_deletion(plan, None, vms, vm)
            return _delete(vm, plan, found)
        with connect_or_start(found.socket) as client:
            if running is None and not found.force:
                inventory_when_let_go(client, vm.name, vm.spec.disks)
            plan_vm_deletion(plan, client, vms, vm, keep_disks=found.keep_disks)
            return _delete(vm, plan, found)


def _delete(vm: Vm, plan: Plan, found: argparse.Namespace) -> int:
    if carry_out(plan, found, f"Delete VM '{vm.name}'?"):
        if found.json:
            print_json({"deleted": vm.name})
        else:
            print(f"VM '{vm.name}' is deleted")
    return DONE
