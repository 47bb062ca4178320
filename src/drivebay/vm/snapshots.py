"""Snapshots of whole VMs: all disks of one instant, with vm.toml and UEFI's variables beside.

Context: a short-lived process that holds the VM's lock. The content of a disk is kept in its
pool, as DISK@TAG (disks.snapshots); the rest in the VM's folder:

    snapshots/TAG/snapshot.toml   when, and which volumes
    snapshots/TAG/…               vm.toml, vars.fd, user-data … as they were

The guest's memory is not part of it: a VM goes back to what was on its disks. While one goes
back, a mark in its folder names the snapshot; if that is interrupted, the mark stays, and the
VM does not start before it was done again.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.deleting import plan_disk_deletion
from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.plan import Plan
from drivebay.disks.snapshots import (
    check_free_for_snapshot,
    plan_end_of_revert,
    plan_revert,
    refuse_connected,
)
from drivebay.errors import AlreadyExists, HostError, InUse, NotFound, StateError, UsageError
from drivebay.system.files import write_private
from drivebay.system.tables import Table
from drivebay.vm.disks import SNAPSHOTS_OF_OURS, check_writers, offer, plan_offer, remove_controller
from drivebay.vm.renewal import MARK
from drivebay.vm.spec import DiskSpec, VmSpec
from drivebay.vm.spec_file import read_spec
from drivebay.vm.stillness import Moment, drop_snapshots, own_volumes, take_snapshots
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["Kept", "Snapshot", "Taking", "all_of", "find", "plan_deletion", "plan_return",
           "plan_taking"]  # fmt: skip

WAS_OFF: Final = "as they were when the VM ended"
_FACTS: Final = "snapshot.toml"
_NEW: Final = ".new"
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", re.ASCII)


@dataclass(frozen=True)
class Kept:
    """A disk's content in a snapshot."""

    disk: str  # its name in the VM
    volume: str  # POOL/NAME
    bdev: str  # the uuid of the volume POOL/NAME@TAG


@dataclass(frozen=True)
class Snapshot:
    """What a VM was at one instant."""

    tag: str
    folder: Path
    taken: datetime
    consistency: str
    volumes: tuple[Kept, ...]

    def text(self) -> str:
        """vm.toml as it was. Raises: HostError."""
        return (_read(self.folder / "vm.toml") or b"").decode(errors="replace")


def all_of(vm: Vm) -> list[str]:
    """The tags of a VM's snapshots, sorted."""
    found = vm.snapshots.glob(f"*/{_FACTS}")
    return sorted(path.parent.name for path in found if _TAG.fullmatch(path.parent.name))


def find(vm: Vm, tag: str) -> Snapshot:
    """Read one. Raises: NotFound; UsageError when its file is wrong; HostError."""
    there = all_of(vm)
    if tag not in there:
        raise NotFound(
            f"VM '{vm.name}' has no snapshot '{tag[:80]}'",
            hint=f"it has: {', '.join(there)}" if there else f"drivebay vm snapshot {vm.name} TAG",
        )
    folder = vm.snapshots / tag
    where = f"{_FACTS} of snapshot '{tag}' of '{vm.name}'"
    try:
        top = Table(where, tomllib.loads((_read(folder / _FACTS) or b"").decode()))
    except ValueError as error:  # no TOML, or no UTF-8
        raise UsageError(f"{where} is not TOML: {error}", hint=f"mend it: {folder}") from error
    taken = top.take("taken", datetime, required=True)
    consistency = top.take("consistency", str, required=True)
    volumes = []
    for number, item in enumerate(top.take("volume", list, required=True)):
        table = Table(f"{where}, [[volume]] {number + 1}", dict(item))
        kept = Kept(*(table.take(key, str, required=True) for key in ("disk", "volume", "bdev")))
        table.end()
        volumes.append(kept)
    top.end()
    return Snapshot(tag, folder, taken, consistency, tuple(volumes))


# ---- taking -------------------------------------------------------------------------------------


@dataclass
class Taking:
    """A plan, and what it has taken once it has run."""

    plan: Plan
    volumes: list[str]  # POOL/NAME@TAG
    moment: Moment


def plan_taking(vm: Vm, tag: str, runs: bool, client: Client, inventory: Inventory) -> Taking:
    """Plan a snapshot. Raises: UsageError, AlreadyExists, StateError, NotFound."""
    if not _TAG.fullmatch(tag) or SNAPSHOTS_OF_OURS.fullmatch(tag):
        raise UsageError(
            f"'{tag[:80]}' can't be the name of a snapshot: 1 to 40 letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit, and not as clones and exports name theirs"
        )
    if tag in all_of(vm):
        raise AlreadyExists(
            f"VM '{vm.name}' has a snapshot '{tag}' already",
            hint=f"drivebay vm snapshot {vm.name} {tag} --delete",
        )
    overlays = [disk.name for disk in vm.spec.disks if disk.overlay is not None]
    if overlays:
        raise StateError(
            f"disk '{overlays[0]}' of VM '{vm.name}' is an overlay, a file that QEMU serves, and "
            "only disks in pools have snapshots",
            hint="make the VM without --overlay",
        )
    own = own_volumes(vm, inventory)
    if not own:
        raise StateError(f"VM '{vm.name}' has no disk of its own, so there is nothing to keep")
    wanted = [(disk, check_free_for_snapshot(inventory, disk, tag)) for disk in own.values()]
    taking = Taking(Plan(), [f"{disk.pool}/{name}" for disk, name in wanted], Moment(False, ""))
    shared = [disk.name for disk in vm.spec.disks if disk.shared]
    if shared:
        taking.plan.facts.append(f"Not part of it, as others write there: {', '.join(shared)}.")
    names = ", ".join(f"'{name}'" for _, name in wanted)
    taking.plan.add(
        f"freeze VM '{vm.name}' for a moment, and take the snapshots {names}"
        if runs
        else f"take the snapshots {names}",
        lambda: _take(taking, vm, tag, runs, client, own, wanted),
    )
    return taking


def _take(
    taking: Taking,
    vm: Vm,
    tag: str,
    runs: bool,
    client: Client,
    own: dict[str, Disk],
    wanted: Sequence[tuple[Disk, str]],
) -> None:
    """All or nothing. Files are copied at the instant of the disks: UEFI writes its variables."""
    fresh = vm.snapshots / _NEW
    shutil.rmtree(fresh, ignore_errors=True)  # of one that was killed
    try:
        _make_folder(vm, fresh)
        taking.moment = take_snapshots(
            client, vm, runs, wanted, lambda moment: _copy_files(vm, fresh)
        )
        try:
            _write_facts(fresh / _FACTS, taking.moment, own)
            fresh.rename(vm.snapshots / tag)
        except BaseException:
            drop_snapshots(client, wanted)
            raise
    except OSError as error:
        raise _refusal("can't keep", vm.snapshots / tag, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _make_folder(vm: Vm, fresh: Path) -> None:
    vm.snapshots.mkdir(mode=0o700, exist_ok=True)
    fresh.mkdir(mode=0o700)


def _files(spec: VmSpec) -> list[str]:
    """What in a VM's folder belongs to the moment, if it is there; vm.toml is the last."""
    user_data = None if spec.cloud_init is None else spec.cloud_init.user_data
    return [name for name in ("vars.fd", MARK, user_data, "vm.toml") if name is not None]


def _copy_files(vm: Vm, folder: Path) -> None:
    for name in _files(vm.spec):
        data = _read(vm.folder / name)
        if data is not None:
            write_private(folder / name, data)


def _write_facts(path: Path, moment: Moment, own: dict[str, Disk]) -> None:
    import tomlkit

    document = tomlkit.document()
    document["taken"] = datetime.now(UTC).replace(microsecond=0)
    document["consistency"] = moment.consistency or WAS_OFF
    volumes = tomlkit.aot()
    for (disk, volume), bdev in zip(own.items(), moment.bdevs, strict=True):
        volumes.append(tomlkit.item({"disk": disk, "volume": volume.reference, "bdev": bdev}))
    document["volume"] = volumes
    write_private(path, tomlkit.dumps(document).encode())


# ---- going back ---------------------------------------------------------------------------------


def plan_return(vms: Vms, vm: Vm, snapshot: Snapshot, client: Client, inventory: Inventory) -> Plan:
    """Plan the way back of a VM that is off: all, or as it was.

    Raises: NotFound when a part of the snapshot is gone; InUse, StateError, UsageError.
    """
    text = snapshot.text()
    before = read_spec(vm.name, text)
    pairs = [_pair(vm, snapshot, kept, inventory) for kept in snapshot.volumes]
    planned = Vm(vm.folder, before, text)
    for disk in before.disks:
        if disk.bdev is not None:
            check_writers(vm.name, disk, inventory, [*vms.others(vm.name), planned])
    plan = Plan()
    mark = _plan_mark(plan, vm, snapshot)
    _plan_controllers(plan, client, vm.spec, before)
    for volume, snap in pairs:
        plan_revert(plan, client, inventory, volume, snap)
    _plan_files(plan, vm, snapshot, before)
    plan.add("take the mark away", lambda: vm.unfinished_revert.unlink(missing_ok=True), mark)
    plan_end_of_revert(plan, client, [volume for volume, _ in pairs])
    return plan


def _pair(vm: Vm, snapshot: Snapshot, kept: Kept, inventory: Inventory) -> tuple[Disk, Disk]:
    """A disk, and its content of then. Raises: NotFound, InUse."""
    forget = f"drivebay vm snapshot {vm.name} {snapshot.tag} --delete"
    try:
        disk = inventory.disk(kept.volume)
    except NotFound:
        raise NotFound(
            f"VM '{vm.name}' can't go back to '{snapshot.tag}': its disk '{kept.disk}' of then, "
            f"'{kept.volume}', is gone",
            hint=forget,
        ) from None
    snap = next((volume for volume in inventory.volumes if volume.bdev == kept.bdev), None)
    if snap is None or not snap.snapshot or snap.pool != disk.pool:
        raise NotFound(
            f"VM '{vm.name}' can't go back to '{snapshot.tag}': the snapshot of its disk "
            f"'{kept.disk}', '{kept.volume}@{snapshot.tag}', was deleted",
            hint=forget,
        )
    refuse_connected(disk)
    return disk, snap


def _plan_mark(plan: Plan, vm: Vm, snapshot: Snapshot) -> Callable[[], None]:
    was_marked = vm.unfinished_revert.exists()

    def mark() -> None:
        write_private(vm.unfinished_revert, snapshot.tag.encode())

    def unmark() -> None:
        if not (was_marked or plan.left):  # else its disks are of different moments
            vm.unfinished_revert.unlink(missing_ok=True)

    plan.add(
        f"mark VM '{vm.name}' as on its way to '{snapshot.tag}'",
        mark,
        unmark,
    )
    return mark


def _plan_controllers(plan: Plan, client: Client, now: VmSpec, before: VmSpec) -> None:
    """The sockets of disks that came since go, those of disks that left since come back."""
    for disk in _without(now.disks, before.disks):
        plan.facts.append(
            f"Disk '{disk.name}' ('{disk.bdev}') came after the snapshot: it is detached, and "
            "stays as it is."
        )
        plan.add(
            f"take away the socket of disk '{disk.name}'",
            partial(remove_controller, client, now.name, disk.name),
            partial(offer, client, now.name, [disk]),
        )
    plan_offer(plan, client, replace(before, disks=_without(before.disks, now.disks)))


def _without(disks: Sequence[DiskSpec], others: Sequence[DiskSpec]) -> tuple[DiskSpec, ...]:
    there = {(disk.name, disk.bdev) for disk in others}
    return tuple(
        disk for disk in disks if disk.bdev is not None and (disk.name, disk.bdev) not in there
    )


def _plan_files(plan: Plan, vm: Vm, snapshot: Snapshot, before: VmSpec) -> None:
    names = _files(before)
    then = {name: _read(snapshot.folder / name) for name in names}
    now = {name: _read(vm.folder / name) for name in names}
    plan.add(
        f"write vm.toml of VM '{vm.name}' as it was",
        lambda: _put_all(vm.folder, then, now),
        lambda: _put_all(vm.folder, now, now),
    )


def _put_all(
    folder: Path, wanted: dict[str, bytes | None], before: dict[str, bytes | None]
) -> None:
    """All or none. Of what was not kept only the mark of a clone goes."""
    try:
        for name, data in wanted.items():
            if data is not None:
                write_private(folder / name, data)
            elif name == MARK or wanted is before:
                (folder / name).unlink(missing_ok=True)
    except BaseException:
        if wanted is not before:
            _put_all(folder, before, before)
        raise


# ---- deleting -----------------------------------------------------------------------------------


def plan_deletion(vm: Vm, snapshot: Snapshot, client: Client, inventory: Inventory) -> Plan:
    """Plan that a snapshot goes; one that was stopped in the middle goes on. Raises: InUse."""
    if vm.unfinished_revert.exists():
        raise InUse(
            f"VM '{vm.name}' is half on its way back to a snapshot",
            hint=f"drivebay vm revert {vm.name} {snapshot.tag}",
        )
    plan = Plan()
    there = {volume.bdev: volume for volume in inventory.volumes}
    for kept in snapshot.volumes:
        volume = there.get(kept.bdev)
        if volume is not None:
            _refuse_branch(vm, volume, inventory)
            plan_disk_deletion(plan, client, inventory, volume)
    plan.add(f"forget the snapshot '{snapshot.tag}'", lambda: _forget(vm, snapshot))
    return plan


def _refuse_branch(vm: Vm, volume: Disk, inventory: Inventory) -> None:
    """Raises: InUse when both the disk and a newer snapshot go on from one: after a revert."""
    readers = inventory.children(volume)
    newer = [tag for tag in all_of(vm) if any(one.name.endswith(f"@{tag}") for one in readers)]
    if len(readers) > 1 and newer:
        raise InUse(
            f"both the disk and the snapshot '{newer[0]}' go on from '{volume.name}'",
            hint=f"that one first: drivebay vm snapshot {vm.name} {newer[0]} --delete",
        )


def _forget(vm: Vm, snapshot: Snapshot) -> None:
    gone = vm.snapshots / _NEW
    try:
        shutil.rmtree(gone, ignore_errors=True)
        snapshot.folder.rename(gone)  # at once, so that no half of it is ever listed
        shutil.rmtree(gone)
    except OSError as error:
        raise _refusal("can't remove", snapshot.folder, error) from error


# ---- files --------------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    """A file of the VM's folder, None if it is not there. Raises: HostError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal("can't read", path, error) from error


def _refusal(what: str, path: Path, error: OSError) -> HostError:
    return HostError(f"{what} '{path}'", error.errno or 0, path=str(path))
