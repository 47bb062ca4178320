"""Clones of a VM: disks that begin with the original's, and an identity of their own.

Context: a short-lived process. Nothing is copied: each disk's present state becomes a snapshot,
from which both the original and its clones go on. A running original is held still meanwhile.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.places import data_folder
from drivebay.disks.plan import Plan
from drivebay.errors import HostError, StateError
from drivebay.vm import renewal, run
from drivebay.vm.disks import CLONE_SNAPSHOT, check_volume_free, plan_offer
from drivebay.vm.identity import Origin, host_machine_id, new_identity
from drivebay.vm.nets import plan_places
from drivebay.vm.ports import free_forward
from drivebay.vm.spec import DHCP, SSH_PORT, DiskSpec, NetSpec, VmSpec
from drivebay.vm.stillness import drop_snapshots, own_volumes, snapshot_name, take_snapshots
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["Clones", "plan_clones"]


@dataclass
class Clones:
    """A plan, the VMs that it makes, and what is known of their file systems afterwards."""

    plan: Plan
    specs: list[VmSpec]
    volumes: list[str]  # the new ones, by POOL/NAME
    drop_snapshots: Callable[[], object]  # once the volumes read from none
    has_agent: bool  # known when the plan has run, as is
    consistency: str = ""


def plan_clones(
    vms: Vms, vm: Vm, names: Sequence[str], client: Client, inventory: Inventory
) -> Clones:
    """Plan clones of a VM. Raises: AlreadyExists, StateError."""
    for name in names:
        vms.check_free(name)
    plan = Plan()
    sources = own_volumes(vm, inventory)
    running = run.running(vm)
    if running is not None and any(disk.overlay is not None for disk in vm.spec.disks):
        raise StateError(
            f"VM '{vm.name}' runs on an overlay, which only QEMU may read now",
            hint=f"drivebay vm stop {vm.name} first",
        )
    mark = f"{CLONE_SNAPSHOT}{secrets.token_hex(4)}"
    wanted = [(source, snapshot_name(source, mark)) for source in sources.values()]
    drop = partial(drop_snapshots, client, wanted)
    clones = Clones(plan, [], [], drop, renewal.is_pending(vm))
    if sources:
        plan.add(
            f"freeze VM '{vm.name}' for a moment, and take a snapshot of each disk"
            if running is not None
            else "take a snapshot of each disk",
            lambda: _take(clones, vm, running is not None, client, wanted),
            drop,
        )
    origin = Origin(host_machine_id(data_folder()), vms.folder)
    others = vms.others("")
    for name in names:
        spec = _spec(vm.spec, name, origin, others, sources)
        clones.specs.append(spec)
        # The next one must not take the same address or port.
        others.append(Vm(Path(), spec, ""))
        for disk_name, source in sources.items():
            check_volume_free(inventory, str(source.pool), f"{name}-{disk_name}")
            _plan_volume(plan, client, source, mark, f"{name}-{disk_name}")
            clones.volumes.append(f"{source.pool}/{name}-{disk_name}")
        plan.add(f"make VM '{name}'", _maker(clones, vms, vm, spec), _unmaker(vms, name))
        plan_places(plan, name, spec.nets)
        plan_offer(plan, client, spec)
    return clones


def _spec(
    before: VmSpec, name: str, origin: Origin, others: Sequence[Vm], sources: dict[str, Disk]
) -> VmSpec:
    taken = {net.mac for other in others for net in other.spec.nets}
    spec = new_identity(before, name, origin, taken)
    nets: list[NetSpec] = []
    for net, original in zip(spec.nets, before.nets, strict=True):
        if net.kind != "user":  # where the original has its address still
            net = replace(net, address=DHCP, gateway=None, dns=())
        if any(forward.leads_to_ssh for forward in original.forward):
            beside = [forward for each in nets for forward in each.forward]
            net = replace(net, forward=(free_forward(others, SSH_PORT, beside),))
        nets.append(net)
    disks = [
        replace(disk, bdev=f"{sources[disk.name].pool}/{name}-{disk.name}", made=True)
        if disk.name in sources
        else replace(disk, made=disk.overlay is not None)  # what is shared stays the original's
        for disk in spec.disks
    ]
    return replace(spec, nets=tuple(nets), disks=tuple(disks), iso=None, vnc=None)


def _unmaker(vms: Vms, name: str) -> Callable[[], object]:
    return lambda: vms.delete(vms.load(name))


# ---- disks --------------------------------------------------------------------------------------


def _take(
    clones: Clones, vm: Vm, runs: bool, client: Client, wanted: Sequence[tuple[Disk, str]]
) -> None:
    moment = take_snapshots(client, vm, runs, wanted)
    clones.has_agent |= moment.has_agent
    clones.consistency = moment.consistency


def _plan_volume(plan: Plan, client: Client, source: Disk, mark: str, name: str) -> None:
    plan.add(
        f"make the disk '{name}', a clone of '{source.name}'",
        lambda: call(
            client,
            "bdev_lvol_clone",
            {"snapshot_name": f"{source.pool}/{snapshot_name(source, mark)}", "clone_name": name},
        ),
        lambda: call(client, "bdev_lvol_delete", {"name": f"{source.pool}/{name}"}),
    )


# ---- folders ------------------------------------------------------------------------------------


def _maker(clones: Clones, vms: Vms, vm: Vm, spec: VmSpec) -> Callable[[], object]:
    def fill(made: Vm) -> None:
        _fill(vm, made)
        if spec.cloud_init is None and clones.has_agent:
            renewal.mark(made.folder)

    return lambda: vms.create(spec, fill)


def _fill(vm: Vm, made: Vm) -> None:
    """Keys of its own, and copies of the original's files."""
    from drivebay.vm.ssh import make_keys

    make_keys(made.keys, made.spec.uuid)
    if made.spec.firmware == "uefi":  # they say what is started from the disks
        _copy(vm.firmware_variables, made.firmware_variables)
    for disk in made.spec.disks:
        _copy_overlay(vm, made, disk)
    if made.spec.cloud_init is not None and made.spec.cloud_init.user_data is not None:
        _copy(vm.folder / made.spec.cloud_init.user_data,
              made.folder / made.spec.cloud_init.user_data)  # fmt: skip


def _copy_overlay(vm: Vm, made: Vm, disk: DiskSpec) -> None:
    """An overlay that somebody writes can lie below no other, so the clone gets a copy."""
    if disk.overlay is not None:
        _copy(vm.folder / disk.overlay, made.folder / disk.overlay)


def _copy(source: Path, target: Path) -> None:
    done = subprocess.run(
        ["cp", "--reflink=auto", "--sparse=always", "--preserve=mode", "--", source, target],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise HostError(f"can't copy '{source}': {done.stderr.strip()[:200]}", 5, path=str(target))
