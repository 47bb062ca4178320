"""VMs of a lab that are there already, and what an edited file changes in them.

Context: a short-lived process that holds the lab's lock. vm.toml gets what the file says, and
keeps what it does not; a VM that runs sees it at its next start, but for disks, which come and
go at once. Only the lab's own disks are looked at: one that a person attached stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from drivebay.disks.inventory import Inventory
from drivebay.disks.plan import Plan
from drivebay.errors import HostError
from drivebay.system.files import write_private
from drivebay.vm.attaching import plan_attachment, plan_detachment
from drivebay.vm.creation import SYSTEM, USER_DATA
from drivebay.vm.disks import check_writers
from drivebay.vm.lab.disks import part_of, plan_growth, reference_of, there_is
from drivebay.vm.lab.model import LabVm
from drivebay.vm.lab.networks import coming_networks
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Up, told_at, would_lose
from drivebay.vm.lab.vms import check_files, nets_of
from drivebay.vm.nets import choose_nets, plan_leaving, plan_places
from drivebay.vm.spec import CloudInit, DiskSpec, NetSpec, VmSpec
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import Vm

__all__ = ["plan_new_disks", "plan_settings"]


def plan_settings(up: Up, vm: LabVm) -> None:
    """Plan what changes in a VM, and which disks it loses. Raises: what would lose data."""
    with told_at(up.lab.source, vm.place):
        full = up.site.full(vm.name)
        there = up.site.vms.load(full)
        thing = up.site.record.find("vm", vm.name)
        if thing is None or not thing.finished:
            bdev = there.spec.disk(SYSTEM)
            up.settled.append(Thing("vm", vm.name, bdev=(bdev and bdev.bdev) or ""))
        _compare_system(up, vm, there.spec)
        check_files(vm)
        wanted = _wanted(up, vm, there.spec)
        own = _own_user_data(vm, there)
        if wanted != there.spec or own is not None:
            read_spec(full, write_spec(wanted, there.text))
            up.add(f"change vm.toml of VM '{full}'", _saver(up, vm, own))
        for disk in _leaving(up, up.inventory, vm, there.spec):
            up.add(f"take disk '{disk.name}' from VM '{full}'", _detacher(up, full, disk))


def plan_new_disks(up: Up, vm: LabVm) -> None:
    """Plan the disks that a VM gets; after all have lost theirs, since one may change hands."""
    full = up.site.full(vm.name)
    there = up.site.vms.load(full)
    for disk in vm.disks:
        reference = reference_of(up, up.inventory, up.lab.disk(disk.disk))
        held = there.spec.disk(disk.name)
        if held is None or held.bdev != reference:
            up.add(f"give VM '{full}' the disk '{disk.name}'", _attacher(up, vm, disk.name))


# ---- what would be lost -------------------------------------------------------------------------


def _compare_system(up: Up, vm: LabVm, spec: VmSpec) -> None:
    system = spec.disk(SYSTEM)
    if vm.image is not None and vm.image != spec.image:
        was = f"the image '{spec.image}'" if spec.image else "no image"
        raise would_lose(
            f"VM '{spec.name}' began with {was}, and the file says '{vm.image}'", vm.name
        )
    if vm.firmware is not None and vm.firmware != spec.firmware:
        raise would_lose(
            f"VM '{spec.name}' was installed with the firmware '{spec.firmware}', and the file "
            f"says '{vm.firmware}'",
            vm.name,
        )
    if not vm.has_system_disk:
        return
    reference = f"{up.pool_name(vm.pool)}/{spec.name}-{SYSTEM}"
    if system is None or system.bdev != reference:
        has = f"'{system.bdev}'" if system is not None else "none"
        raise would_lose(
            f"the system disk of VM '{spec.name}' is {has}, and the file says '{reference}'",
            vm.name,
        )
    there = there_is(up.inventory, reference)
    if there is not None and vm.size is not None:
        plan_growth(up, vm.name, there, vm.size)


# ---- vm.toml ------------------------------------------------------------------------------------


def _wanted(up: Up, vm: LabVm, spec: VmSpec) -> VmSpec:
    """vm.toml as the file has it; the lab's disks that stay get their marks."""
    spec = replace(
        spec,
        memory=spec.memory if vm.memory is None else vm.memory,
        cpus=spec.cpus if vm.cpus is None else vm.cpus,
        bus=spec.bus if vm.bus is None else vm.bus,
        iso=spec.iso if vm.iso is None else str(vm.iso),
        boot=spec.boot if vm.boot is None else vm.boot,
        qemu=spec.qemu if vm.qemu is None else vm.qemu,
        qemu_args=spec.qemu_args if vm.qemu_args is None else vm.qemu_args,
        shares=spec.shares if vm.shares is None else vm.shares,
        autostart=spec.autostart if vm.autostart is None else vm.autostart,
    )
    if vm.nets is not None:
        spec = replace(spec, nets=_nets(up, vm, spec))
    if spec.cloud_init is not None:
        spec = replace(spec, cloud_init=_cloud_init(vm, spec.cloud_init))
    marks = {disk.name: disk for disk in vm.disks}
    return replace(
        spec,
        disks=tuple(
            replace(disk, shared=marks[disk.name].shared, bus=marks[disk.name].bus)
            if disk.name in marks and not disk.made
            else disk
            for disk in spec.disks
        ),
    )


def _nets(up: Up, vm: LabVm, spec: VmSpec) -> tuple[NetSpec, ...]:
    """The interfaces as the file has them; MAC addresses and our port for ssh stay."""
    wished = nets_of(up, vm, spec.nets)
    coming = coming_networks(up)
    if any(net.network in coming for net in wished):  # when the step is done it is there
        return tuple(
            replace(net, mac=f"52:54:00:00:00:{number:02x}") for number, net in enumerate(wished)
        )
    others = up.site.vms.others(spec.name)
    return choose_nets(up.site.vms, spec.name, wished, others, spec.nets, ssh=False)


def _cloud_init(vm: LabVm, before: CloudInit) -> CloudInit:
    return replace(
        before,
        user=before.user if vm.user is None else vm.user,
        ssh_keys=before.ssh_keys if vm.ssh_keys is None else vm.ssh_keys,
        packages=before.packages if vm.packages is None else vm.packages,
        user_data=before.user_data if vm.user_data is None else USER_DATA,
    )


def _own_user_data(vm: LabVm, there: Vm) -> bytes | None:
    """The content of the person's user-data, if it is another one than the VM has."""
    if vm.user_data is None or there.spec.cloud_init is None:
        return None
    try:
        wanted = vm.user_data.read_bytes()
        kept = there.folder / USER_DATA
        return None if kept.exists() and kept.read_bytes() == wanted else wanted
    except OSError as error:
        raise HostError(
            f"can't read '{error.filename}'", error.errno or 0, path=str(vm.user_data)
        ) from error


def _saver(up: Up, vm: LabVm, user_data: bytes | None) -> Callable[[], object]:
    def save() -> None:
        vms, full = up.site.vms, up.site.full(vm.name)
        with vms.locked(full):
            there = vms.load(full)
            if user_data is not None:
                write_private(there.folder / USER_DATA, user_data)
            wanted = _wanted(up, vm, there.spec)
            plan = Plan()
            if wanted.nets != there.spec.nets:
                plan_places(plan, full, wanted.nets)
            plan.add("save", lambda: vms.save(there, wanted))
            if wanted.nets != there.spec.nets:
                plan_leaving(plan, full, wanted.nets)
            plan.run()

    return save


# ---- disks --------------------------------------------------------------------------------------


def _leaving(up: Up, inventory: Inventory, vm: LabVm, spec: VmSpec) -> list[DiskSpec]:
    """The lab's disks that the VM has, and the file does not give it under that name."""
    wanted = {(disk.name, reference_of(up, inventory, up.lab.disk(disk.disk))) for disk in vm.disks}
    return [
        disk
        for disk in spec.disks
        if disk.bdev is not None
        and not disk.made
        and (disk.name, disk.bdev) not in wanted
        and _is_the_labs(up, disk.bdev)
    ]


def _is_the_labs(up: Up, bdev: str) -> bool:
    for thing in up.site.record.things.values():
        if thing.kind == "disk" and thing.bdev == bdev:
            return True
        if thing.kind == "parts" and part_of(thing, bdev):
            return True
    return False


def _detacher(up: Up, full: str, disk: DiskSpec) -> Callable[[], object]:
    def detach() -> None:
        vms = up.site.vms
        with vms.locked(full):
            plan = Plan()
            plan_detachment(plan, up.site.client, vms, vms.load(full), disk)
            plan.run()

    return detach


def _attacher(up: Up, vm: LabVm, name: str) -> Callable[[], object]:
    def attach() -> None:
        site = up.site
        (wished,) = [disk for disk in vm.disks if disk.name == name]
        with site.vms.locked(site.full(vm.name)):
            there = site.vms.load(site.full(vm.name))
            inventory = site.inventory()
            reference = reference_of(up, inventory, up.lab.disk(wished.disk))
            disk = DiskSpec(name, reference, shared=wished.shared, bus=wished.bus)
            plan = Plan()
            plan_attachment(plan, site.client, site.vms, there, disk)
            check_writers(there.name, disk, inventory, [*site.vms.others(there.name), there])
            plan.run()

    return attach
