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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.places import data_folder
from drivebay.disks.plan import Plan
from drivebay.errors import DrivebayError, HostError, StateError
from drivebay.vm import renewal, run
from drivebay.vm.agent import Agent
from drivebay.vm.disks import CLONE_SNAPSHOT, plan_offer
from drivebay.vm.firmware import make_variables
from drivebay.vm.identity import Origin, host_machine_id, new_identity
from drivebay.vm.ports import free_forward
from drivebay.vm.spec import DiskSpec, VmSpec
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
    snapshots: list[str]  # with which they begin
    consistency: str = ""  # known when the plan has run, as is
    has_agent: bool = False


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
    clones = Clones(plan, [], [], [_snapshot(source, mark) for source in sources.values()])
    if sources:
        plan.add(
            f"freeze VM '{vm.name}' for a moment, and take a snapshot of each disk"
            if running is not None
            else "take a snapshot of each disk",
            lambda: _take_snapshots(clones, vm, running is not None, client, sources, mark),
            lambda: _drop_snapshots(client, sources, mark),
        )
    origin = Origin(host_machine_id(data_folder()), vms.folder)
    others = vms.others("")
    for name in names:
        spec = _spec(vm.spec, name, origin, others, sources)
        clones.specs.append(spec)
        # The next one must not take the same address or port.
        others.append(Vm(Path(), spec, ""))
        for disk_name, source in sources.items():
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
    nets = []
    for net, original in zip(spec.nets, before.nets, strict=True):
        if any(forward.guest_port == _SSH_PORT for forward in original.forward):
            net = replace(net, forward=(free_forward(others, _SSH_PORT),))
        nets.append(net)
    disks = [
        replace(disk, bdev=f"{sources[disk.name].pool}/{name}-{disk.name}", made=True)
        if disk.name in sources
        else disk
        for disk in spec.disks
    ]
    return replace(spec, nets=tuple(nets), disks=tuple(disks))


def _unmaker(vms: Vms, name: str) -> Callable[[], object]:
    return lambda: vms.delete(vms.load(name))


# ---- disks --------------------------------------------------------------------------------------


def _take_snapshots(
    clones: Clones, vm: Vm, runs: bool, client: Client, sources: dict[str, Disk], mark: str
) -> None:
    with ExitStack() as stack:
        if runs:
            clones.has_agent, clones.consistency = stack.enter_context(_held_still(vm))
        taken = []
        try:
            for source in sources.values():
                call(
                    client,
                    "bdev_lvol_snapshot",
                    {"lvol_name": source.reference, "snapshot_name": f"{source.name}@{mark}"},
                )
                taken.append(source)
        except BaseException:
            for source in taken:
                call(client, "bdev_lvol_delete", {"name": _snapshot(source, mark)})
            raise


def _drop_snapshots(client: Client, sources: dict[str, Disk], mark: str) -> None:
    for source in sources.values():
        call(client, "bdev_lvol_delete", {"name": _snapshot(source, mark)})


def _snapshot(source: Disk, mark: str) -> str:
    return f"{source.pool}/{source.name}@{mark}"


def _plan_volume(plan: Plan, client: Client, source: Disk, mark: str, name: str) -> None:
    plan.add(
        f"make the disk '{name}', a clone of '{source.name}'",
        lambda: call(
            client,
            "bdev_lvol_clone",
            {"snapshot_name": _snapshot(source, mark), "clone_name": name},
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
            except (DrivebayError, OSError):
                stack.close()
        if qmp.call("query-status")["status"] == "running":
            qmp.call("stop")
            stack.callback(lambda: qmp.call("cont"))
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
    if made.spec.firmware == "uefi":
        make_variables(made.firmware_variables)
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
