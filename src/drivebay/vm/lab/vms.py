"""The new VMs of a lab: what the file says becomes a wish, as `vm create` would have it.

Context: a short-lived process that holds the lab's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drivebay.disks.connection import call
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, HostError, NotFound, StateError, UsageError
from drivebay.vm.creation import CPUS, MEMORY, SYSTEM, DiskWish, Wish, plan_creation
from drivebay.vm.disks import check_volume_free
from drivebay.vm.firmware import find_uefi
from drivebay.vm.images.building import RECIPES, build_image
from drivebay.vm.images.store import Image
from drivebay.vm.iso import check_iso
from drivebay.vm.joining import check_joins
from drivebay.vm.lab.disks import reference_of, there_is
from drivebay.vm.lab.model import LabVm
from drivebay.vm.lab.networks import coming_networks
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Site, Up, told_at
from drivebay.vm.lifecycle import check_able
from drivebay.vm.ports import check_free, free_forward
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import SSH_PORT, CloudInit, DiskSpec, Forward, NetSpec, VmSpec
from drivebay.vm.store import Vm

__all__ = ["check_files", "is_there", "nets_of", "plan_image", "plan_vm", "remove_half_made"]


def is_there(up: Up, vm: LabVm) -> bool:
    """Whether the VM is there, and stays. Raises: AlreadyExists when it is not the lab's."""
    full = up.site.full(vm.name)
    if ("vm", vm.name) in up.doomed or full not in up.site.vms.names():
        return False
    if up.site.vms.load(full).spec.lab != up.site.name:
        raise AlreadyExists(
            f"there is a VM '{full}' already, and this lab did not make it",
            hint='another name for the lab: name = "…"',
        )
    return True


def plan_image(up: Up, vm: LabVm) -> None:
    """Build the image of a VM that is to be made, if there is none. Raises: NotFound."""
    name = vm.image
    if name is None or name in up.site.images.names():
        return
    if name not in RECIPES:
        raise NotFound(
            f"there is no image '{name}'",
            hint=f"drivebay image list; 'up' itself builds {' and '.join(RECIPES)}",
        )
    text = f"build the image '{name}'"
    if text not in up.plan.texts:
        site = up.site
        up.add(text, lambda: build_image(site.images, name, name, site.say, site.report))


def plan_vm(up: Up, vm: LabVm) -> None:
    """Plan a VM that is not there. Raises: what would make it impossible."""
    with told_at(up.lab.source, vm.place):
        _check(up, vm)
        memory = format_size(MEMORY if vm.memory is None else vm.memory)
        begins = "" if vm.image is None else f", begun with the image '{vm.image}'"
        up.add(f"make VM '{up.site.full(vm.name)}', {memory}{begins}", lambda: _make(up, vm))


def _check(up: Up, vm: LabVm) -> None:
    """Look whether it could be made, before anything else is."""
    full = up.site.full(vm.name)
    if ("vm", vm.name) not in up.doomed:
        up.site.vms.check_free(full)
        thing = up.thing("vm", vm.name)
        if thing is None or thing.finished:
            check_volume_free(up.inventory, up.pool_name(vm.pool), f"{full}-{SYSTEM}")
    check_files(vm)
    disks = [DiskSpec(SYSTEM, bdev="-")] if vm.has_system_disk else []
    disks += [DiskSpec(disk.name, bdev="-", bus=disk.bus) for disk in vm.disks]
    qemu = find_qemu(vm.qemu)
    nets = (NetSpec("user", ""),) if vm.nets is None else vm.nets
    coming = coming_networks(up)
    check_joins(tuple(net for net in nets if net.network not in coming))
    spec = VmSpec(full, "-", qemu.machine, MEMORY, CPUS, bus=vm.bus or "virtio",
                  disks=tuple(disks), nets=nets, shares=vm.shares or ())  # fmt: skip
    check_able(Vm(Path(), spec, ""), qemu)
    if vm.firmware == "uefi":
        find_uefi()
    check_free(_explicit(vm), up.site.vms.others(full))
    if vm.image in up.site.images.names():
        assert vm.image is not None
        image = up.site.images.get(vm.image)
        image.check_unchanged()
        if vm.size is not None and vm.size < image.size:
            raise UsageError(
                f"the image '{image.name}' needs {format_size(image.size)}, and 'size' is "
                f"{format_size(vm.size)}"
            )
        _cloud_init(vm, image.facts.cloud_init)
    else:
        _cloud_init(vm, None if vm.image == "debian" else False)


def check_files(vm: LabVm) -> None:
    """Raises: HostError for a file that the VM needs and that can't be read."""
    files = [] if vm.boot is None else [vm.boot.kernel, vm.boot.initrd]
    files += [] if vm.user_data is None else [str(vm.user_data)]
    if vm.iso is not None:
        check_iso(vm.iso)
    for name in filter(None, files):
        try:
            with Path(name).open("rb"):
                pass
        except OSError as error:
            raise HostError(f"can't read '{name}'", error.errno or 0, path=name) from error


def _explicit(vm: LabVm) -> list[Forward]:
    return [forward for net in vm.nets or () for forward in net.forward]


def _cloud_init(vm: LabVm, has: bool | None) -> CloudInit | None:
    """What cloud-init is told, where there may be one; ``has`` is what is known of the image."""
    said = {
        "user": vm.user, "ssh_keys": vm.ssh_keys, "packages": vm.packages,
        "user_data": vm.user_data,
    }  # fmt: skip
    if vm.image is None and vm.iso is not None:
        if not any(value is not None for value in said.values()):
            return None
    elif vm.image is None or has is False:
        for key, value in said.items():
            if value is not None:
                raise UsageError(
                    f"'{key}' is for cloud-init, which "
                    + ("the image lacks" if vm.image else "only an image or an ISO may have"),
                    field=key,
                )
        return None
    cloud_init = CloudInit("", vm.name, ssh_keys=vm.ssh_keys or (), packages=vm.packages or ())
    return cloud_init if vm.user is None else replace(cloud_init, user=vm.user)


# ---- making -------------------------------------------------------------------------------------


def _make(up: Up, vm: LabVm) -> None:
    site = up.site
    full = site.full(vm.name)
    begun = site.record.find("vm", vm.name)
    if begun is not None:
        if full in site.vms.names():
            site.record.finish(begun)
            return
        if not begun.finished:
            remove_half_made(site, begun)
    with site.images.locked():  # one that somebody deletes meanwhile must not lose its first clone
        image = None if vm.image is None else site.images.get(vm.image)
        wish = _wish(up, vm, image)
        creation = plan_creation(
            site.vms, wish, find_qemu(vm.qemu), vm.qemu, site.client, site.socket
        )
        bdev = f"{up.pool_name(vm.pool)}/{full}-{SYSTEM}" if vm.has_system_disk else ""
        site.make(Thing("vm", vm.name, bdev=bdev), creation.plan)


def _wish(up: Up, vm: LabVm, image: Image | None) -> Wish:
    inventory = up.site.inventory()
    disks = []
    if vm.has_system_disk:
        disks.append(DiskWish(vm.size, up.pool_name(vm.pool), name=SYSTEM))
    for disk in vm.disks:
        bdev = reference_of(up, inventory, up.lab.disk(disk.disk))
        disks.append(DiskWish(bdev=bdev, name=disk.name, bus=disk.bus, shared=disk.shared))
    return Wish(
        name=up.site.full(vm.name),
        memory=MEMORY if vm.memory is None else vm.memory,
        cpus=CPUS if vm.cpus is None else vm.cpus,
        image=image,
        iso=vm.iso,
        disks=disks,
        nets=nets_of(up, vm),
        bus=vm.bus or "virtio",
        firmware=vm.firmware or "bios",
        boot=vm.boot,
        qemu_args=vm.qemu_args or (),
        shares=vm.shares or (),
        autostart=vm.autostart or False,
        lab=up.site.name,
        cloud_init=_cloud_init(vm, None if image is None else image.facts.cloud_init),
        user_data=vm.user_data,
    )


def nets_of(up: Up, vm: LabVm, before: Sequence[NetSpec] = ()) -> tuple[NetSpec, ...]:
    """A VM's interfaces as the file has them, without MAC addresses. A user network gets a forward
    to the guest's sshd: the one ``before``, or by a port that no VM of the file has or will have.
    """
    nets = [NetSpec("user", "")] if vm.nets is None else list(vm.nets)
    at = next((number for number, net in enumerate(nets) if net.kind == "user"), None)
    if at is None or any(forward.leads_to_ssh for net in nets for forward in net.forward):
        return tuple(nets)
    kept = [f for net in before for f in net.forward if f.leads_to_ssh and not f.guest_address]
    if not kept:
        reserved = [each for other in up.lab.vms for each in _explicit(other)]
        others = up.site.vms.others(up.site.full(vm.name))
        kept = [free_forward(others, SSH_PORT, reserved)]
    nets[at] = replace(nets[at], forward=(*nets[at].forward, kept[0]))
    return tuple(nets)


def remove_half_made(site: Site, thing: Thing) -> None:
    """Remove what a killed `up` has left of a VM whose folder was never made."""
    volume = there_is(site.inventory(), thing.bdev)
    if volume is not None:
        if volume.uses:
            raise StateError(f"'{thing.bdev}' is shown by '{volume.uses[0].controller}'")
        call(site.client, "bdev_lvol_delete", {"name": thing.bdev})
