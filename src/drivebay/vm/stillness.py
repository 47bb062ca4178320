"""Snapshots of all disks of a VM at one instant, for which a running one is held still.

Context: a short-lived process.

    agent freezes file systems ─► QEMU stops ─► a snapshot of every disk ─► QEMU goes on ─►
    agent thaws

Without an agent the disks are as after a power cut, which journals are made for. What is in
the guest's memory is not part of it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import RpcRefused, call
from drivebay.disks.inventory import NAME_BYTES_MOST, Disk, Inventory
from drivebay.errors import DrivebayError, StateError
from drivebay.vm import run
from drivebay.vm.agent import Agent

if TYPE_CHECKING:
    from drivebay.rpc.client import Client
    from drivebay.vm.qmp import Qmp
    from drivebay.vm.store import Vm

__all__ = [
    "Moment",
    "drop_snapshots",
    "held_still",
    "own_volumes",
    "refuse_half_reverted",
    "snapshot_name",
    "somebody_has_opened",
    "take_snapshots",
]

_AGENT_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Moment:
    """The instant of snapshots: whether the guest had an agent, and how its file systems were."""

    has_agent: bool
    consistency: str  # empty for a VM that was off
    bdevs: tuple[str, ...] = ()  # the snapshots' uuids, in the order of their volumes


def own_volumes(vm: Vm, inventory: Inventory) -> dict[str, Disk]:
    """The volumes of a VM that can have snapshots, by the disk's name: none that it shares.

    Raises: StateError for a disk that lies in no pool, or disks that are half reverted; NotFound.
    """
    refuse_half_reverted(vm)
    found = {}
    for disk in vm.spec.disks:
        if disk.bdev is None or disk.shared:
            continue
        there = inventory.disk(disk.bdev)
        if there.pool is None:
            raise StateError(
                f"disk '{disk.name}' of VM '{vm.name}' is '{disk.bdev}', which lies in no pool and "
                "has no snapshots",
                hint=f"drivebay vm detach {vm.name} {disk.name}",
            )
        found[disk.name] = there
    return found


def snapshot_name(volume: Disk, mark: str) -> str:
    """The name of a snapshot that the tool takes for itself: the disk's may have to be cut."""
    room = NAME_BYTES_MOST - len(f"@{mark}")
    return f"{volume.name.encode()[:room].decode(errors='ignore')}@{mark}"


def refuse_half_reverted(vm: Vm) -> None:
    """Raises: StateError when a revert was interrupted, so that disks may differ in their time."""
    try:
        tag = vm.unfinished_revert.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        tag = "TAG"
    raise StateError(
        f"VM '{vm.name}' was on its way back to a snapshot when that was interrupted: its disks "
        "may be of different moments",
        hint=f"drivebay vm revert {vm.name} {tag}",
    )


def take_snapshots(
    client: Client,
    vm: Vm,
    runs: bool,
    wanted: Sequence[tuple[Disk, str]],
    meanwhile: Callable[[Moment], object] = lambda moment: None,
) -> Moment:
    """Take a snapshot of each volume under its name: all or none.

    ``meanwhile`` is called at the same instant. None is left either when the machine cannot be
    set going again.
    """
    moment = Moment(False, "")
    taken = []
    try:
        with ExitStack() as stack:
            if runs:
                moment = Moment(*stack.enter_context(held_still(vm)))
            for volume, name in wanted:
                params = {"lvol_name": volume.reference, "snapshot_name": name}
                taken.append((volume, name))  # after Ctrl-C it may be there
                try:
                    bdev = call(client, "bdev_lvol_snapshot", params)
                except RpcRefused:
                    taken.pop()
                    raise
                moment = replace(moment, bdevs=(*moment.bdevs, str(bdev)))
            meanwhile(moment)
    except BaseException:
        drop_snapshots(client, taken)
        raise
    return moment


def drop_snapshots(client: Client, taken: Iterable[tuple[Disk, str]]) -> None:
    """Delete those that are there; their blocks become those of the only one who reads them."""
    for volume, name in taken:
        try:
            call(client, "bdev_lvol_delete", {"name": f"{volume.pool}/{name}"})
        except RpcRefused as error:
            if error.code != -errno.ENODEV:
                raise


@contextlib.contextmanager
def held_still(vm: Vm) -> Iterator[tuple[bool, str]]:
    """Hold a running VM still while the block runs.

    Yields whether it has an agent, and what its file systems are meanwhile.
    """
    with run.monitor(vm) as qmp, ExitStack() as stack:
        has_agent = False
        said = "as after a power cut: the guest has no agent that could freeze its file systems"
        if somebody_has_opened(qmp, "agent"):
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


def somebody_has_opened(qmp: Qmp, port: str) -> bool:
    """Whether a program in the guest has its end of a serial port open.

    QEMU knows, so that nobody has to wait in vain for an answer of a guest without an agent.
    """
    ports = {entry["label"]: entry["frontend-open"] for entry in qmp.call("query-chardev")}
    return bool(ports.get(port))
