"""A new VM: from what somebody wishes to a plan that makes its disks and its folder.

Context: a short-lived process. Planning only looks; running the plan makes all or nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import find_socket
from drivebay.disks.inventory import Inventory, read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.pools import DEFAULT_POOL, choose_pool, plan_default_pool
from drivebay.disks.sizes import format_size
from drivebay.errors import DrivebayError, HostError, NotFound, UsageError
from drivebay.vm.disks import (
    check_writers,
    plan_clone_of_image,
    plan_empty_disk,
    plan_offer,
)
from drivebay.vm.firmware import find_uefi, make_variables
from drivebay.vm.identity import new_instance_id, new_uuid
from drivebay.vm.iso import check_iso
from drivebay.vm.lifecycle import check_able
from drivebay.vm.nets import choose_nets, plan_places
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import (
    Boot,
    CloudInit,
    DiskSpec,
    NetSpec,
    ShareSpec,
    VmSpec,
    VncSpec,
)
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client
    from drivebay.vm.images.store import Image

__all__ = [
    "CPUS",
    "MEMORY",
    "SYSTEM",
    "USER_DATA",
    "Creation",
    "DiskWish",
    "Wish",
    "plan_creation",
    "plan_disk",
]

MEMORY: Final = 1 << 30  # unless somebody says otherwise
CPUS: Final = 2
SYSTEM: Final = "system"


@dataclass(frozen=True)
class DiskWish:
    """A disk: a new one of ``size`` (None: as large as the image) in a pool, or a bdev."""

    size: int | None = None
    pool: str | None = None
    bdev: str | None = None
    name: str | None = None
    bus: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Wish:
    """What somebody asks for; the rest is chosen."""

    name: str
    memory: int
    cpus: int
    image: Image | None = None
    overlay: bool = False
    disks: Sequence[DiskWish] = ()
    nets: Sequence[NetSpec] = (NetSpec("user", ""),)  # what they have not, is chosen
    bus: str = "virtio"
    firmware: str = "bios"
    iso: Path | None = None
    boot: Boot | None = None
    qemu_args: Sequence[str] = ()
    autostart: bool = False
    lab: str | None = None
    shares: Sequence[ShareSpec] = ()
    vnc: VncSpec | None = None
    cloud_init: CloudInit | None = None  # its instance_id is chosen here
    user_data: Path | None = None


@dataclass(frozen=True)
class Creation:
    """A plan, and the VM as it will be."""

    plan: Plan
    spec: VmSpec


def plan_creation(
    vms: Vms, wish: Wish, qemu: Qemu, named_qemu: str | None, client: Client, socket: str | None
) -> Creation:
    """Plan a VM. Raises: AlreadyExists, InUse, NotFound, StateError, UsageError."""
    vms.check_free(wish.name)
    others = vms.others(wish.name)
    plan = Plan()
    inventory = read_inventory(client)
    disks = _plan_disks(plan, client, inventory, wish, find_socket(socket))
    spec = VmSpec(
        name=wish.name,
        uuid=new_uuid(),
        machine=qemu.machine,
        memory=wish.memory,
        cpus=wish.cpus,
        firmware=wish.firmware,
        bus=wish.bus,
        image=None if wish.image is None else wish.image.name,
        autostart=wish.autostart,
        iso=None if wish.iso is None else str(wish.iso.absolute()),
        lab=wish.lab,
        qemu=named_qemu,
        qemu_args=tuple(wish.qemu_args),
        boot=wish.boot,
        disks=disks,
        nets=choose_nets(vms, wish.name, wish.nets, others),
        shares=tuple(wish.shares),
        vnc=wish.vnc,
        cloud_init=_cloud_init(wish),
    )
    planned = Vm(Path(), spec, "")
    read_spec(wish.name, write_spec(spec))  # what could not be read again is not made
    check_able(planned, qemu)
    for disk in disks:
        if disk.bdev is not None and not disk.made:
            check_writers(wish.name, disk, inventory, [*others, planned])
    _check_guest_values(spec)
    if wish.firmware == "uefi":
        find_uefi()
    if wish.iso is not None:
        check_iso(wish.iso)
    plan.add(
        f"make VM '{wish.name}': {wish.cpus} CPU{'s' * (wish.cpus > 1)}, "
        f"{format_size(wish.memory)} of memory"
        f"{'' if wish.iso is None else f', {wish.iso.name} in its CD drive'}",
        lambda: vms.create(spec, lambda vm: _fill(vm, wish)),
        lambda: vms.delete(vms.load(spec.name)),
    )
    plan_places(plan, spec.name, spec.nets)
    plan_offer(plan, client, spec)
    return Creation(plan, spec)


def _check_guest_values(spec: VmSpec) -> None:
    from drivebay.vm.seed import check_cloud_init, check_net

    if spec.cloud_init is not None:
        check_cloud_init(spec.cloud_init)
    for net in spec.nets:
        check_net(net)


# ---- disks --------------------------------------------------------------------------------------


def _plan_disks(
    plan: Plan, client: Client, inventory: Inventory, wish: Wish, socket: str
) -> tuple[DiskSpec, ...]:
    wishes = list(wish.disks)
    found: list[DiskSpec] = []
    if wish.image is not None:
        # The first disk without a bdev says how large the system disk becomes, and where.
        own = next((each for each in wishes if each.bdev is None), None)
        system = DiskWish() if own is None else own
        if own is not None:
            wishes.remove(own)
        if wish.overlay:
            if system.pool is not None:
                raise UsageError("an overlay is a file in the VM's folder, and lies in no pool")
            if system.shared:
                raise UsageError("an overlay is a file of one VM, and can't be shared")
            _check_overlay(wish.image, system.size)
            name = system.name or SYSTEM
            found.append(DiskSpec(name, overlay=f"{name}.qcow2", made=True, bus=system.bus))
        else:
            pool = _pool(plan, client, inventory, system.pool, socket)
            volume = f"{wish.name}-{system.name or SYSTEM}"
            plan_clone_of_image(plan, client, inventory, wish.image, pool, volume, system.size)
            found.append(
                DiskSpec(
                    system.name or SYSTEM,
                    bdev=f"{pool}/{volume}",
                    made=True,
                    shared=system.shared,
                    bus=system.bus,
                )
            )
    elif wish.overlay:
        raise UsageError("--overlay needs an image to lie on", hint="add --image IMAGE")
    for each in wishes:
        taken = {disk.name for disk in found}
        name = each.name or _free_name(taken, first=not found)
        found.append(
            plan_disk(plan, client, inventory, wish.name, replace(each, name=name), socket)
        )
    return tuple(found)


def _free_name(taken: set[str], *, first: bool) -> str:
    if first:
        return SYSTEM
    number = 1
    while f"disk{number}" in taken:
        number += 1
    return f"disk{number}"


def plan_disk(
    plan: Plan, client: Client, inventory: Inventory, vm: str, wish: DiskWish, socket: str
) -> DiskSpec:
    """Plan one disk, which has a name: an empty one, or a bdev that is there.

    Raises: AlreadyExists, NotFound, StateError, UsageError.
    """
    assert wish.name is not None
    if wish.bdev is not None:
        there = inventory.disk(wish.bdev)
        if wish.size is not None or wish.pool is not None:
            raise UsageError(f"the disk '{wish.bdev}' is there already: leave size and pool out")
        return DiskSpec(wish.name, bdev=there.reference, shared=wish.shared, bus=wish.bus)
    if wish.size is None:
        raise UsageError("a new disk needs a size", hint="such as --disk 20G")
    pool = _pool(plan, client, inventory, wish.pool, socket)
    volume = f"{vm}-{wish.name}"
    plan_empty_disk(plan, client, inventory, pool, volume, wish.size)
    return DiskSpec(wish.name, bdev=f"{pool}/{volume}", made=True, shared=wish.shared, bus=wish.bus)


def _pool(plan: Plan, client: Client, inventory: Inventory, named: str | None, socket: str) -> str:
    pool = choose_pool(inventory, named)
    if pool is not None:
        return pool.name
    if not any(DEFAULT_POOL in text for text in plan.texts):
        plan_default_pool(plan, client, socket)
    return DEFAULT_POOL


def _check_overlay(image: Image, size: int | None) -> None:
    if size is not None and size < image.virtual_size:
        raise UsageError(
            f"the image '{image.name}' needs {format_size(image.virtual_size)}, and a disk of "
            f"{format_size(size)} is smaller"
        )


# ---- cloud-init ---------------------------------------------------------------------------------


def _cloud_init(wish: Wish) -> CloudInit | None:
    if wish.cloud_init is None:
        return None
    user_data = None if wish.user_data is None else USER_DATA
    return replace(wish.cloud_init, instance_id=new_instance_id(), user_data=user_data)


USER_DATA: Final = "user-data"


# ---- the folder ---------------------------------------------------------------------------------


def _fill(vm: Vm, wish: Wish) -> None:
    """Add keys, firmware variables, an overlay and own user-data to a new VM's folder."""
    from drivebay.vm.ssh import make_keys

    make_keys(vm.keys, vm.spec.uuid)
    if vm.spec.firmware == "uefi":
        make_variables(vm.firmware_variables)
    if wish.user_data is not None:
        try:
            shutil.copyfile(wish.user_data, vm.folder / USER_DATA)
            (vm.folder / USER_DATA).chmod(0o600)
        except OSError as error:
            raise HostError(
                f"can't read the user-data '{wish.user_data}'", error.errno or 0,
                path=str(wish.user_data),
            ) from error  # fmt: skip
    for disk in vm.spec.disks:
        if disk.overlay is not None:
            assert wish.image is not None
            _make_overlay(vm.folder / disk.overlay, wish.image, _overlay_size(wish))


def _overlay_size(wish: Wish) -> int | None:
    return next((each.size for each in wish.disks if each.bdev is None), None)


def _make_overlay(path: Path, image: Image, size: int | None) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.path)]
    command += [str(path)] if size is None else [str(path), str(size)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotFound(
            "an overlay needs qemu-img", hint="sudo apt-get install qemu-utils"
        ) from None
    if done.returncode != 0:
        raise DrivebayError(f"qemu-img made no overlay: {done.stderr.strip()[:300]}")
    path.chmod(0o600)
