"""Clones of a VM: disks that begin with the original's, and an identity of their own.

Context: a short-lived process. Nothing is copied: each disk's present state becomes a snapshot,
from which both the original and its clones go on.

    a running original:  agent freezes file systems ─► QEMU stops ─► a snapshot of every disk
                         ─► QEMU goes on ─► agent thaws

so that all disks are of one instant. Without an agent the clones see the disks as after a power
cut, which journals are made for.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import call
from drivebay.disks.inventory import NAME_BYTES_MOST, Disk, Inventory
from drivebay.disks.places import data_folder
from drivebay.disks.plan import Plan
from drivebay.errors import DrivebayError, HostError, StateError
from drivebay.vm import renewal, run
from drivebay.vm.agent import Agent
from drivebay.vm.disks import CLONE_SNAPSHOT, check_volume_free, plan_offer
from drivebay.vm.identity import Origin, host_machine_id, new_identity
from drivebay.vm.ports import free_forward
from drivebay.vm.spec import DiskSpec, NetSpec, VmSpec
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client
    from drivebay.vm.qmp import Qmp

__all__ = ["Clones", "plan_clones"]

_SSH_PORT: Final = 22
_AGENT_SECONDS: Final = 2.0


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
    sources = _sources(vm, inventory)
    running = run.running(vm)
    if running is not None and any(disk.overlay is not None for disk in vm.spec.disks):
        raise StateError(
            f"VM '{vm.name}' runs on an overlay, which only QEMU may read now",
            hint=f"drivebay vm stop {vm.name} first",
        )
    mark = f"{CLONE_SNAPSHOT}{secrets.token_hex(4)}"
    drop = partial(_drop_snapshots, client, sources.values(), mark)
    clones = Clones(plan, [], [], drop, renewal.is_pending(vm))
    if sources:
        plan.add(
            f"freeze VM '{vm.name}' for a moment, and take a snapshot of each disk"
            if running is not None
            else "take a snapshot of each disk",
            lambda: _take_snapshots(clones, vm, running is not None, client, sources, mark),
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
        plan_offer(plan, client, spec)
    return clones


def _sources(vm: Vm, inventory: Inventory) -> dict[str, Disk]:
    """The volumes that are cloned, by the disk's name. Raises: StateError for what can't be."""
    found = {}
    for disk in vm.spec.disks:
        if disk.bdev is None or disk.shared:
            continue  # an overlay is copied, and a shared disk stays one
        there = inventory.disk(disk.bdev)
        if there.pool is None:
            raise StateError(
                f"disk '{disk.name}' of VM '{vm.name}' is '{disk.bdev}', which lies in no pool and "
                "has no snapshots",
                hint=f"drivebay vm detach {vm.name} {disk.name}",
            )
        found[disk.name] = there
    return found


def _spec(
    before: VmSpec, name: str, origin: Origin, others: Sequence[Vm], sources: dict[str, Disk]
) -> VmSpec:
    taken = {net.mac for other in others for net in other.spec.nets}
    spec = new_identity(before, name, origin, taken)
    nets: list[NetSpec] = []
    for net, original in zip(spec.nets, before.nets, strict=True):
        if any(forward.guest_port == _SSH_PORT for forward in original.forward):
            beside = [forward for each in nets for forward in each.forward]
            net = replace(net, forward=(free_forward(others, _SSH_PORT, beside),))
        nets.append(net)
    disks = [
        replace(disk, bdev=f"{sources[disk.name].pool}/{name}-{disk.name}", made=True)
        if disk.name in sources
        else replace(disk, made=disk.overlay is not None)  # what is shared stays the original's
        for disk in spec.disks
    ]
    return replace(spec, nets=tuple(nets), disks=tuple(disks))


def _unmaker(vms: Vms, name: str) -> Callable[[], object]:
    return lambda: vms.delete(vms.load(name))


# ---- disks --------------------------------------------------------------------------------------


def _take_snapshots(
    clones: Clones, vm: Vm, runs: bool, client: Client, sources: dict[str, Disk], mark: str
) -> None:
    """All or none, also when the machine cannot be set going again."""
    taken = []
    try:
        with ExitStack() as stack:
            if runs:
                has_agent, clones.consistency = stack.enter_context(_held_still(vm))
                clones.has_agent |= has_agent
            for source in sources.values():
                call(
                    client,
                    "bdev_lvol_snapshot",
                    {"lvol_name": source.reference, "snapshot_name": _snapshot(source, mark)},
                )
                taken.append(source)
    except BaseException:
        _drop_snapshots(client, taken, mark)
        raise


def _drop_snapshots(client: Client, sources: Iterable[Disk], mark: str) -> None:
    for source in sources:
        name = f"{source.pool}/{_snapshot(source, mark)}"
        call(client, "bdev_lvol_delete", {"name": name})


def _snapshot(source: Disk, mark: str) -> str:
    """The snapshot's name, for which a disk's name may have to be cut."""
    room = NAME_BYTES_MOST - len(f"@{mark}")
    return f"{source.name.encode()[:room].decode(errors='ignore')}@{mark}"


def _plan_volume(plan: Plan, client: Client, source: Disk, mark: str, name: str) -> None:
    plan.add(
        f"make the disk '{name}', a clone of '{source.name}'",
        lambda: call(
            client,
            "bdev_lvol_clone",
            {"snapshot_name": f"{source.pool}/{_snapshot(source, mark)}", "clone_name": name},
        ),
        lambda: call(client, "bdev_lvol_delete", {"name": f"{source.pool}/{name}"}),
    )


@contextlib.contextmanager
def _held_still(vm: Vm) -> Iterator[tuple[bool, str]]:
    """Hold a running VM still while the block runs.

    Yields whether it has an agent, and what its file systems are meanwhile.
    """
    with run.monitor(vm) as qmp, ExitStack() as stack:
        has_agent = False
        said = "as after a power cut: the guest has no agent that could freeze its file systems"
        if _somebody_has_opened(qmp, "agent"):
            try:
                agent = stack.enter_context(Agent(vm.agent_socket, _AGENT_SECONDS))
                has_agent = True
                count = stack.enter_context(agent.frozen())
                said = f"whole: the guest's agent froze {count} file systems"
            except DrivebayError as error:
                said = f"as after a power cut: the guest's agent froze nothing ({error})"
                stack.close()
        if qmp.call("query-status")["status"] == "running":
            stack.callback(lambda: qmp.call("cont"))  # also if the answer to this is lost:
            qmp.call("stop")
        yield has_agent, said


def _somebody_has_opened(qmp: Qmp, port: str) -> bool:
    """Whether a program in the guest has its end of a serial port open.

    QEMU knows, so that nobody has to wait in vain for an answer of a guest without an agent.
    """
    ports = {entry["label"]: entry["frontend-open"] for entry in qmp.call("query-chardev")}
    return bool(ports.get(port))


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
