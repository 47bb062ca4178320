"""A VM's disk written to a file of any format, from a VM that is off or runs.

Context: a short-lived process. A disk is a stack of volumes in a pool, the lowest of which may
begin with an image; only the target can read them.

    snapshot ─► a sparse file, with the image's data ─► the target copies each layer over it,
    the lowest first ─► the snapshot goes ─► qemu-img converts ─► fsync ─► FILE

Until the last rename all is under other names, beside FILE, where there has to be room. What a
killed export left in the target and there is removed by the next one of the disk: the names
say which process made it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.disks.connection import RpcRefused, call
from drivebay.disks.inventory import Disk, Inventory, read_inventory
from drivebay.disks.places import (
    free_bytes,
    give_name,
    make_sparse_file,
    remove_file,
    resize_file,
)
from drivebay.disks.sizes import format_size
from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.vm import run
from drivebay.vm.disks import EXPORT_SNAPSHOT, inventory_when_let_go
from drivebay.vm.images import qemu_img
from drivebay.vm.images.store import Report, host_errors
from drivebay.vm.stillness import (
    Moment,
    drop_snapshots,
    refuse_half_reverted,
    snapshot_name,
    take_snapshots,
)

if TYPE_CHECKING:
    from drivebay.rpc.client import Client
    from drivebay.vm.spec import DiskSpec
    from drivebay.vm.store import Vm, Vms

__all__ = ["Export", "plan_export"]

_OWN: Final = re.compile(rf"{EXPORT_SNAPSHOT}([0-9]+)", re.ASCII)
_LOOK_EVERY_S: Final = 0.1
_END_SECONDS: Final = 30.0
_PIECE: Final = 8 << 20
_ROOM_FOR_TABLES: Final = 64 << 20


@dataclass
class Export:
    """What is to be written where, and how the file systems were once it is."""

    vm: Vm
    disk: DiskSpec
    target: Path
    kind: str
    needed: int  # bytes beside FILE, at most
    moment: Moment = field(default_factory=lambda: Moment(False, ""))

    @property
    def mark(self) -> str:
        """What this process calls its own."""
        return f"{EXPORT_SNAPSHOT}{os.getpid()}"

    @property
    def raw(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.mark}.raw")

    @property
    def fresh(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.mark}.new")


def plan_export(
    vm: Vm, disk: DiskSpec, target: Path, kind: str, inventory: Inventory | None
) -> Export:
    """Look whether a disk can be exported; ``inventory`` is None for an overlay.

    Raises: AlreadyExists, NotFound, InUse, StateError when there is no room, UsageError.
    """
    refuse_half_reverted(vm)
    if os.path.lexists(target):
        raise _taken(target)
    if not target.parent.is_dir():
        raise NotFound(f"there is no folder '{target.parent}'", hint=f"mkdir -p {target.parent}")
    if disk.shared:
        raise UsageError(
            f"disk '{disk.name}' of VM '{vm.name}' is shared: others write to it meanwhile",
            hint="switch them off, and set 'shared = false' in vm.toml for the export",
        )
    if inventory is None:
        if run.running(vm) is not None:
            raise InUse(
                f"VM '{vm.name}' runs on an overlay, which only QEMU may read now",
                hint=f"drivebay vm stop {vm.name}",
            )
        needed = _held(vm.folder / str(disk.overlay))
    else:
        needed = _needed(_volume(vm, disk, inventory), inventory)
        needed *= 1 if kind == "raw" else 2
    free = free_bytes(target.parent)
    if needed > free:
        raise StateError(
            f"the export may need {format_size(needed)}, and where '{target.name}' shall lie "
            f"{format_size(free)} are left: '{target.parent}'",
            hint="make room there, or name a file elsewhere"
            + ("" if kind == "raw" else "; FILE.raw needs half of it"),
        )
    return Export(vm, disk, target, kind, needed)


def _taken(path: Path) -> AlreadyExists:
    return AlreadyExists(f"there is a file '{path}' already", hint=f"rm '{path}'")


def _volume(vm: Vm, disk: DiskSpec, inventory: Inventory) -> Disk:
    assert disk.bdev is not None
    volume = inventory.disk(disk.bdev)
    if volume.pool is None:
        place = "" if volume.place is None else f"; it is '{volume.place}'"
        raise StateError(
            f"disk '{disk.name}' of VM '{vm.name}' is '{disk.bdev}', which lies in no pool: copy "
            f"that itself{place}"
        )
    return volume


def _needed(volume: Disk, inventory: Inventory) -> int:
    """What its layers hold at most, with what the lowest begins with."""
    layers = [volume, *inventory.chain(volume)]
    base = _base(layers[-1], inventory)
    held = 0 if base is None else _held(base)
    return held + sum(layer.used or 0 for layer in layers)


def _base(lowest: Disk, inventory: Inventory) -> Path | None:
    """The file that the lowest layer begins with. Raises: NotFound, StateError."""
    if lowest.external is None:
        return None
    below = inventory.disk(lowest.external)
    if below.place is None or not Path(below.place).is_file():
        raise StateError(f"disk '{lowest.name}' begins with '{below.name}', which is no file")
    return Path(below.place)


def _held(path: Path) -> int:
    with host_errors(f"can't look at '{path}'", path):
        return path.stat().st_blocks * 512


# ---- the steps ----------------------------------------------------------------------------------


def export(wanted: Export, vms: Vms, client: Client | None, report: Report) -> None:
    """Write the file, at once or not at all.

    ``client`` is None for an overlay. Raises: AlreadyExists, HostError, StateError, Unreachable.
    """
    what = f"{wanted.vm.name}'s disk '{wanted.disk.name}'"
    try:
        with _nobody_else_reads():
            if client is None:
                with vms.locked(wanted.vm.name):
                    overlay = wanted.vm.folder / str(wanted.disk.overlay)
                    _convert(overlay, "qcow2", wanted, what, report)
            else:
                _flatten(wanted, vms, client, report)
                if wanted.kind == "raw":
                    os.chown(wanted.raw, os.geteuid(), os.getegid())  # it may be the target's
                    wanted.raw.rename(wanted.fresh)
                else:
                    _convert(wanted.raw, "raw", wanted, what, report)
        with host_errors(f"can't make '{wanted.target}'", wanted.target):
            _sync(wanted.fresh)
            try:
                give_name(wanted.fresh, wanted.target)
            except FileExistsError:
                raise _taken(wanted.target) from None
            _sync(wanted.target.parent)
    finally:
        for path in (wanted.raw, wanted.fresh):
            path.unlink(missing_ok=True)


def _convert(source: Path, kind: str, wanted: Export, what: str, report: Report) -> None:
    size = qemu_img.virtual_size(source, kind, what) if kind == "raw" else 1 << 50
    size_most = size + size // 8 + _ROOM_FOR_TABLES
    qemu_img.convert(source, kind, wanted.fresh, wanted.kind, what, size_most=size_most,
                     report=report, ours=True)  # fmt: skip


@contextlib.contextmanager
def _nobody_else_reads() -> Iterator[None]:
    """A disk may hold keys and passwords."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(wanted: Export, vms: Vms, client: Client, report: Report) -> None:
    """Make the raw file, by way of a snapshot that is gone afterwards."""
    with vms.locked(wanted.vm.name):
        vm = vms.load(wanted.vm.name)
        runs = run.running(vm) is not None
        # One that runs and that nobody knows of could not be held still.
        inventory = (read_inventory(client) if runs
                     else inventory_when_let_go(client, vm.name, [wanted.disk]))  # fmt: skip
        volume = _volume(vm, wanted.disk, inventory)
        _sweep(client, volume, inventory)
        snapshot = (volume, snapshot_name(volume, wanted.mark))
        wanted.moment = take_snapshots(client, vm, runs, [snapshot])
    try:
        inventory = read_inventory(client)
        top = inventory.disk(f"{volume.pool}/{snapshot[1]}")
        layers = [top, *inventory.chain(top)][::-1]
        _write_layers(wanted, client, layers, _base(layers[0], inventory), report)
    finally:
        drop_snapshots(client, [snapshot])


def _write_layers(
    wanted: Export, client: Client, layers: list[Disk], base: Path | None, report: Report
) -> None:
    what = f"copying disk '{wanted.disk.name}'"
    total = sum(layer.used or 0 for layer in layers) + (0 if base is None else _held(base))
    done = 0

    def tell(more: int) -> None:
        report(what, done + more, total)

    make_sparse_file(wanted.raw, layers[0].size, client.path)
    if base is not None:
        with host_errors(f"can't write '{wanted.raw}'", wanted.raw):
            done = _copy_data(base, wanted.raw, layers[0].size, tell)
    for layer in layers:
        resize_file(wanted.raw, layer.size)  # what is behind its end can't be seen from above
        if layer.used:
            _copy_layer(wanted, client, layer, tell)
            done += layer.used


def _copy_data(source: Path, target: Path, size: int, tell: Callable[[int], object]) -> int:
    """Copy what is no hole, and return how many bytes those were."""
    copied = offset = 0
    with source.open("rb") as reading, target.open("r+b") as writing:
        while offset < size:
            try:
                offset = os.lseek(reading.fileno(), offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # one hole up to the end
                    break
                raise
            end = min(os.lseek(reading.fileno(), offset, os.SEEK_HOLE), size)
            os.lseek(writing.fileno(), offset, os.SEEK_SET)
            while offset < end:
                count = os.sendfile(
                    writing.fileno(), reading.fileno(), offset, min(_PIECE, end - offset)
                )
                if count == 0:
                    raise OSError(errno.EIO, "the image became shorter")
                offset += count
                copied += count
                tell(copied)
    return copied


def _copy_layer(wanted: Export, client: Client, layer: Disk, tell: Callable[[int], object]) -> None:
    """Have the target write what one layer holds itself."""
    number = None
    state: dict[str, Any] = {"state": "in progress"}
    try:
        call(client, "bdev_aio_create", {"name": wanted.mark, "filename": str(wanted.raw)})
        params = {"src_lvol_name": layer.reference, "dst_bdev_name": wanted.mark}
        number = call(client, "bdev_lvol_start_shallow_copy", params)["operation_id"]
        while (state := _state(client, number))["state"] == "in progress":
            tell((layer.used or 0) * state["copied_clusters"] // state["total_clusters"])
            time.sleep(_LOOK_EVERY_S)
    finally:
        _delete_bdev(client, wanted.mark)  # which ends a copy that goes on
        if number is not None and state["state"] == "in progress":
            _wait_for_end(client, number)
    if state["state"] == "error":
        raise _failure(wanted, str(state["error"]))


def _delete_bdev(client: Client, name: str) -> None:
    try:
        call(client, "bdev_aio_delete", {"name": name})
    except RpcRefused as error:
        if error.code != -errno.ENODEV:
            raise


def _state(client: Client, number: int) -> dict[str, Any]:
    found: dict[str, Any] = call(client, "bdev_lvol_check_shallow_copy", {"operation_id": number})
    return found


def _wait_for_end(client: Client, number: int) -> None:
    """A snapshot goes only when nobody copies it any more."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline and _state(client, number)["state"] == "in progress":
        time.sleep(_LOOK_EVERY_S)


def _failure(wanted: Export, said: str) -> DrivebayError:
    if said == os.strerror(errno.ENOSPC):
        return HostError(
            f"can't write '{wanted.raw}'", errno.ENOSPC, path=str(wanted.raw),
            hint=f"df -h {wanted.target.parent}",
        )  # fmt: skip
    return StateError(f"the target could not copy disk '{wanted.disk.name}': {said}")


def _sweep(client: Client, volume: Disk, inventory: Inventory) -> None:
    """Remove what exports of this disk have left whose process is gone."""
    for each in inventory.volumes:
        mark = each.name.rpartition("@")[2]
        found = _OWN.fullmatch(mark)
        if found is None or Path(f"/proc/{found[1]}").exists():
            continue
        with contextlib.suppress(DrivebayError):  # it does not hinder this one
            if each.pool is None and each.place is not None:
                _delete_bdev(client, each.bdev)
                if mark in Path(each.place).name:
                    remove_file(Path(each.place))
            elif each.snapshot and each.name == snapshot_name(volume, mark):
                call(client, "bdev_lvol_delete", {"name": each.reference})
