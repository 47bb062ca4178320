"""vm/exporting.py: layers become one file, and whatever fails or is interrupted leaves nothing.

The target is a model whose clusters are each filled with one byte; qemu-img is the real one.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks.connection import RpcRefused
from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.vm import exporting
from drivebay.vm.exporting import Export, export, plan_export
from drivebay.vm.images.store import Report, quiet
from drivebay.vm.spec import DiskSpec
from drivebay.vm.store import Vm
from tests.fakes.lvol_target import CLUSTER
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import MIB, World, idle_process

SYSTEM = DiskSpec("system", "p/web-system", made=True)
DEAD = 4_190_000  # no process has that number


@pytest.fixture
def vm(world: World) -> Vm:
    world.pool()
    world.volume("web-system")
    return world.vm("web", SYSTEM)


@pytest.fixture
def out(world: World) -> Path:
    folder = world.folder / "out"
    folder.mkdir()
    return folder


def fill(world: World, volume: str, **clusters: int) -> None:
    """fill(world, "web-system", c2=7): its third cluster holds sevens."""
    found = world.target.volumes["p", volume]
    for name, byte in clusters.items():
        found.data[int(name[1:])] = byte
    found.allocated = len(found.data)


def wish(world: World, vm: Vm, target: Path) -> Export:
    kind = target.suffix[1:]
    return plan_export(vm, vm.spec.disks[0], target, kind, world.inventory())


def run(world: World, vm: Vm, target: Path, report: Report = quiet) -> Export:
    wanted = wish(world, vm, target)
    export(wanted, world.vms, world.client, report)
    return wanted


def content(path: Path) -> bytes:
    """The first byte of each cluster of an image."""
    raw = path.with_suffix(".flat")
    command = ["qemu-img", "convert", "-f", path.suffix[1:], "-O", "raw", str(path), str(raw)]
    subprocess.run(command, check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data[::CLUSTER]


def nothing_left(world: World, out: Path) -> None:
    assert list(out.iterdir()) == []
    assert not [name for name in world.volumes() if "@export" in name]
    assert not [name for name in world.target.bases if name.startswith("export")]


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qcow2", "raw", "vmdk"])
def test_each_layer_lies_over_the_one_below(world: World, vm: Vm, out: Path, kind: str) -> None:
    image = world.image("debian", 16 * MIB)
    image.path.chmod(0o600)
    with image.path.open("r+b") as file:
        for number in range(3):
            file.seek(number * CLUSTER)
            file.write(bytes([0x10 + number]) * CLUSTER)
    world.target.bdev_aio_create(image.bdev, str(image.path), readonly=True, uuid=image.uuid)
    del world.target.volumes["p", "web-system"]
    world.target.bdev_lvol_clone_bdev(image.uuid, "p", "web-system")
    fill(world, "web-system", c1=0x21)
    world.target.bdev_lvol_snapshot("p/web-system", "web-system@a")
    world.target.bdev_lvol_resize("p/web-system", 24)
    fill(world, "web-system", c2=0x32, c5=0x35)
    wanted = run(world, vm, out / f"f.{kind}")
    assert content(wanted.target) == bytes([0x10, 0x21, 0x32, 0, 0, 0x35])
    assert wanted.target.stat().st_mode & 0o777 == 0o600
    assert wanted.moment.consistency == ""
    wanted.target.unlink()
    nothing_left(world, out)
    assert world.target.volumes["p", "web-system"].parent == "web-system@a"


def test_what_a_smaller_layer_has_cut_off_is_not_seen_again(
    world: World, vm: Vm, out: Path
) -> None:
    fill(world, "web-system", c0=1, c15=2)
    world.target.bdev_lvol_snapshot("p/web-system", "web-system@a")
    world.target.bdev_lvol_resize("p/web-system", 8)
    world.target.bdev_lvol_snapshot("p/web-system", "web-system@b")
    world.target.bdev_lvol_resize("p/web-system", 64)
    wanted = run(world, vm, out / "f.qcow2")
    assert content(wanted.target) == bytes([1, *[0] * 15])


def test_an_empty_disk_is_a_file_of_zeroes(world: World, vm: Vm, out: Path) -> None:
    wanted = run(world, vm, out / "f.raw")
    assert content(wanted.target) == bytes(16)
    assert wanted.target.stat().st_blocks == 0


def test_how_far_it_is_is_told(world: World, vm: Vm, out: Path) -> None:
    fill(world, "web-system", c0=1, c1=1)
    world.target.copy_states = [
        {"state": "in progress", "copied_clusters": 1, "total_clusters": 2},
        {"state": "complete"},
    ]
    told: list[tuple[str, int, int]] = []
    run(world, vm, out / "f.qcow2", lambda *all: told.append(all))
    assert told[0] == ("copying disk 'system'", CLUSTER, 2 * CLUSTER)
    assert told[-1][0] == "converting web's disk 'system'"
    assert told[-1][1] == told[-1][2]


def test_an_overlay_is_read_with_its_image(world: World, out: Path) -> None:
    image = world.image()
    vm = world.vm("web", DiskSpec("system", overlay="system.qcow2", made=True))
    overlay = vm.folder / "system.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.path, overlay],
        check=True,
    )
    subprocess.run(["qemu-io", "-c", "write -P 7 4M 4M", overlay], check=True, capture_output=True)
    wanted = plan_export(vm, vm.spec.disks[0], out / "f.vmdk", "vmdk", None)
    export(wanted, world.vms, None, quiet)
    assert content(wanted.target) == bytes([0, 7])
    with idle_process() as process:
        seem_to_run(vm, process)
        with pytest.raises(InUse, match="runs on an overlay"):
            plan_export(vm, vm.spec.disks[0], out / "g.vmdk", "vmdk", None)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_file_that_is_there_stays(world: World, vm: Vm, out: Path) -> None:
    (out / "f.raw").write_text("mine")
    with pytest.raises(AlreadyExists, match="there is a file"):
        wish(world, vm, out / "f.raw")
    with pytest.raises(NotFound, match="there is no folder"):
        wish(world, vm, out / "none/f.raw")
    assert world.target.calls == []


def test_a_file_that_appears_meanwhile_stays(world: World, vm: Vm, out: Path) -> None:
    wanted = wish(world, vm, out / "f.raw")
    wanted.target.write_text("mine")
    with pytest.raises(AlreadyExists, match="there is a file"):
        export(wanted, world.vms, world.client, quiet)
    assert wanted.target.read_text() == "mine"
    wanted.target.unlink()
    nothing_left(world, out)


def test_disks_that_cannot_be_read_as_one_moment(world: World, vm: Vm, out: Path) -> None:
    shared = world.vm("s", DiskSpec("d", "p/web-system", shared=True))
    with pytest.raises(UsageError, match="is shared: others write to it"):
        wish(world, shared, out / "f.raw")
    (world.folder / "file").write_bytes(bytes(4096))
    world.target.bdev_aio_create("plain", str(world.folder / "file"))
    plain = world.vm("plain", DiskSpec("d", "plain"))
    with pytest.raises(StateError, match="lies in no pool: copy that itself; it is '.*/file'"):
        wish(world, plain, out / "f.raw")
    vm.unfinished_revert.write_text("before")
    with pytest.raises(StateError, match="on its way back"):
        wish(world, vm, out / "f.raw")


def test_one_whose_machine_nobody_knows_is_not_exported(
    world: World, vm: Vm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.disks.LETTING_GO_SECONDS", 0.0)
    world.target.show("vm.web.system", "p/web-system", sessions=1)
    with pytest.raises(InUse, match="VM 'web' is off, and yet a machine is connected"):
        run(world, vm, out / "f.raw")
    nothing_left(world, out)


def test_no_room_is_told_before_anything_is_done(
    world: World, vm: Vm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world, "web-system", c0=1, c1=1)
    monkeypatch.setattr(exporting, "free_bytes", lambda path: 3 * CLUSTER)
    assert wish(world, vm, out / "f.raw").needed == 2 * CLUSTER
    with pytest.raises(StateError, match="may need 16 MiB, and .* 12 MiB are left"):
        wish(world, vm, out / "f.qcow2")


# ---- what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["bdev_lvol_snapshot", "bdev_aio_create", "bdev_lvol_start_shallow_copy",
     "bdev_lvol_check_shallow_copy"],
)  # fmt: skip
def test_a_call_that_fails_leaves_nothing(world: World, vm: Vm, out: Path, method: str) -> None:
    fill(world, "web-system", c0=1)
    wanted = wish(world, vm, out / "f.qcow2")
    world.target.failing_after = {method: 0}
    with pytest.raises(RpcRefused, match=method):
        export(wanted, world.vms, world.client, quiet)
    nothing_left(world, out)


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        (os.strerror(errno.ENOSPC), HostError, "No space left on device"),
        ("Input/output error", StateError, "could not copy disk 'system': Input/output error"),
    ],
)
def test_a_copy_that_fails_leaves_nothing(
    world: World, vm: Vm, out: Path, said: str, kind: type[DrivebayError], sentence: str
) -> None:
    fill(world, "web-system", c0=1)
    world.target.copy_states = [{"state": "error", "error": said}]
    with pytest.raises(kind, match=sentence):
        run(world, vm, out / "f.qcow2")
    nothing_left(world, out)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_full_file_system_has_no_half_file(
    world: World, vm: Vm, small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Somebody else fills it meanwhile: the room was there when it was looked for."""
    image = world.image("debian", 16 * MIB)
    image.path.chmod(0o600)
    image.path.write_bytes(os.urandom(16 * MIB))
    world.target.bdev_aio_create(image.bdev, str(image.path), uuid=image.uuid)
    del world.target.volumes["p", "web-system"]
    world.target.bdev_lvol_clone_bdev(image.uuid, "p", "web-system")
    monkeypatch.setattr(exporting, "free_bytes", lambda path: 1 << 40)
    with pytest.raises(HostError, match="No space left on device"):
        run(world, vm, small_tmpfs / f"f.{kind}")
    nothing_left(world, small_tmpfs)


def test_a_conversion_that_fills_the_file_system_leaves_nothing(
    world: World, vm: Vm, small_tmpfs: Path
) -> None:
    """The raw file still fits, and what is made of it does not."""
    world.image("debian", 4 * MIB)
    vm = world.vm("o", DiskSpec("system", overlay="system.qcow2", made=True))
    overlay = vm.folder / "system.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", overlay, "16M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 16M", overlay], check=True, capture_output=True)
    target = small_tmpfs / "f.vmdk"
    wanted = Export(vm, vm.spec.disks[0], target, "vmdk", 0)
    with pytest.raises(HostError, match="No space left on device"):
        export(wanted, world.vms, None, quiet)
    nothing_left(world, small_tmpfs)


def interrupting(at: int) -> Callable[..., None]:
    """A report that is Ctrl-C at one of its calls."""
    calls = iter(range(1000))

    def report(*told: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_one_leaves_nothing(world: World, vm: Vm, out: Path, at: int) -> None:
    fill(world, "web-system", c0=1)
    world.target.copy_states = [
        {"state": "in progress", "copied_clusters": 0, "total_clusters": 1},
        {"state": "complete" if at else "error", "error": "No such device"},
    ]
    with pytest.raises(KeyboardInterrupt):
        run(world, vm, out / "f.qcow2", interrupting(at))
    nothing_left(world, out)
    assert world.target.copy_states == [], "the copy's end was waited for"


def test_one_that_cannot_be_renamed_leaves_nothing(
    world: World, vm: Vm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(exporting, "_sync", full)
    with pytest.raises(HostError, match="can't make '.*f.qcow2'"):
        run(world, vm, out / "f.qcow2")
    nothing_left(world, out)


def test_what_a_killed_one_has_left_goes_with_the_next(world: World, vm: Vm, out: Path) -> None:
    living = f"export-{os.getppid()}"
    for mark in (f"export-{DEAD}", living):
        raw = out / f".old.qcow2.{mark}.raw"
        raw.write_bytes(bytes(4096))
        world.target.bdev_aio_create(mark, str(raw))
        world.target.bdev_lvol_snapshot("p/web-system", f"web-system@{mark}")
    world.volume("other")
    world.target.bdev_lvol_snapshot("p/other", f"other@export-{DEAD}")
    run(world, vm, out / "f.raw")
    assert sorted(path.name for path in out.iterdir()) == [f".old.qcow2.{living}.raw", "f.raw"]
    marks = [name for name in world.volumes() if "@" in name]
    assert marks == [f"p/other@export-{DEAD}", f"p/web-system@{living}"]
    assert [name for name in world.target.bases if name.startswith("export")] == [living]


def test_a_disk_that_begins_with_no_file(world: World, vm: Vm, out: Path) -> None:
    world.target.volumes["p", "web-system"].external = "gone"
    with pytest.raises(NotFound, match="there is no disk 'gone'"):
        wish(world, vm, out / "f.raw")
    world.target.bdev_lvol_create("below", 64, "p")
    world.target.volumes["p", "web-system"].external = world.target.volumes["p", "below"].uuid
    with pytest.raises(StateError, match="begins with 'below', which is no file"):
        wish(world, vm, out / "f.raw")
