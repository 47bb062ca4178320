"""vm/snapshots.py: what a snapshot of a VM keeps, the way back, and each step of it failing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.disks.connection import RpcRefused
from drivebay.disks.plan import Plan
from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.system.files import write_private
from drivebay.vm import renewal, snapshots
from drivebay.vm.lifecycle import start
from drivebay.vm.qmp import QmpRefused
from drivebay.vm.snapshots import WAS_OFF, Taking, all_of, find, plan_return, plan_taking
from drivebay.vm.spec import CloudInit, DiskSpec
from drivebay.vm.stillness import own_volumes
from drivebay.vm.store import Vm
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import MIB, World, idle_process

SYSTEM = DiskSpec("system", "p/web-system", made=True)
DATA = DiskSpec("data", "p/web-data", made=True)
LATER = DiskSpec("later", "p/web-later", made=True)


@pytest.fixture
def vm(world: World) -> Vm:
    """A VM with two disks and UEFI, which is off."""
    world.pool()
    world.volume("web-system")
    world.volume("web-data")
    vm = world.vm("web", SYSTEM, DATA, firmware="uefi", memory=512 * MIB)
    vm.firmware_variables.write_bytes(b"boot from system")
    return vm


def taking(world: World, vm: Vm, tag: str = "before", *, runs: bool = False) -> Taking:
    return plan_taking(vm, tag, runs, world.client, world.inventory())


def take(world: World, vm: Vm, tag: str = "before") -> None:
    taking(world, vm, tag).plan.run()


def way_back(world: World, tag: str = "before") -> Plan:
    vm = world.vms.load("web")
    return plan_return(world.vms, vm, find(vm, tag), world.client, world.inventory())


def delete(world: World, tag: str = "before") -> None:
    vm = world.vms.load("web")
    snapshots.plan_deletion(vm, find(vm, tag), world.client, world.inventory()).run()


def state(world: World) -> tuple[object, ...]:
    """All that a failed step must leave as it was."""
    vm = world.vms.load("web")
    files = {
        str(path.relative_to(vm.folder)): path.read_bytes()
        for path in sorted(vm.folder.rglob("*"))
        if path.is_file()
    }
    volumes = {key: (one.uuid, one.parent, one.clusters, one.data) for key, one in
               world.target.volumes.items()}  # fmt: skip
    shown = sorted((entry["ctrlr"], entry["backend_specific"]["block"]["bdev"]) for entry in
                   world.target.controllers)  # fmt: skip
    return files, volumes, shown


def parent(world: World, name: str) -> str | None:
    return world.target.volumes["p", name].parent


# ---- taking -------------------------------------------------------------------------------------


def test_all_disks_and_what_belongs_to_them_are_kept(world: World, vm: Vm) -> None:
    done = taking(world, vm)
    assert done.volumes == ["p/web-system@before", "p/web-data@before"]
    assert done.plan.texts == ["take the snapshots 'web-system@before', 'web-data@before'"]
    done.plan.run()
    assert all_of(vm) == ["before"]
    kept = find(vm, "before")
    assert [(each.disk, each.volume) for each in kept.volumes] == [
        ("system", "p/web-system"), ("data", "p/web-data")]  # fmt: skip
    assert kept.consistency == WAS_OFF
    assert kept.text() == vm.text
    assert (kept.folder / "vars.fd").read_bytes() == b"boot from system"
    assert {path.stat().st_mode & 0o777 for path in kept.folder.iterdir()} == {0o600}
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    for kept_disk in kept.volumes:
        snapshot = world.inventory().disk(kept_disk.bdev)
        assert snapshot.snapshot
        assert snapshot.reference == f"{kept_disk.volume}@before"


def test_a_shared_disk_is_not_part_of_it_and_that_is_said(world: World) -> None:
    world.pool()
    world.volume("web-system")
    world.volume("both")
    vm = world.vm("web", SYSTEM, DiskSpec("both", "p/both", shared=True))
    done = taking(world, vm)
    assert done.plan.facts == ["Not part of it, as others write there: both."]
    done.plan.run()
    assert world.volumes() == ["p/both", "p/web-system", "p/web-system@before"]


@pytest.mark.parametrize(
    "tag", ["", "a b", "a/b", "..", ".new", "-x", "ä", "x" * 41, "clone-0123abcd", "export-77"]
)
def test_names_that_no_snapshot_can_have(world: World, vm: Vm, tag: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of a snapshot"):
        taking(world, vm, tag)


def test_names_that_are_taken_or_too_long(world: World, vm: Vm) -> None:
    take(world, vm)
    with pytest.raises(AlreadyExists, match="VM 'web' has a snapshot 'before' already"):
        taking(world, vm)
    world.target.bdev_lvol_snapshot("p/web-data", "web-data@mine")
    with pytest.raises(AlreadyExists, match="disk 'web-data' has a snapshot 'mine' already"):
        taking(world, vm, "mine")
    world.volume("d" * 40)
    long = world.vm("long", DiskSpec("d", f"p/{'d' * 40}"))
    with pytest.raises(UsageError, match="is too long"):
        taking(world, long, "t" * 23)


def test_disks_that_have_no_snapshots(world: World) -> None:
    overlay = world.vm("o", DiskSpec("system", overlay="system.qcow2", made=True))
    with pytest.raises(StateError, match="disk 'system' of VM 'o' is an overlay"):
        taking(world, overlay)
    with pytest.raises(StateError, match="no disk of its own"):
        taking(world, world.vm("none"))
    (world.folder / "file").write_bytes(bytes(4096))
    world.target.bdev_aio_create("plain", str(world.folder / "file"))
    with pytest.raises(StateError, match="'plain', which lies in no pool"):
        taking(world, world.vm("f", DiskSpec("d", "plain")))


@pytest.mark.parametrize("successes", [0, 1])
def test_a_snapshot_that_fails_leaves_none(world: World, vm: Vm, successes: int) -> None:
    before = state(world)
    world.target.failing_after = {"bdev_lvol_snapshot": successes}
    with pytest.raises(RpcRefused):
        take(world, vm)
    assert state(world) == before
    assert all_of(vm) == []


@pytest.mark.parametrize("which", ["vm.toml", "snapshot.toml"])
def test_a_folder_that_cannot_be_written_leaves_no_snapshot(
    world: World, vm: Vm, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(world)

    def full(path: Path, data: bytes) -> None:
        if path.name == which:
            raise HostError(f"can't write '{path}'", 28)
        write_private(path, data)

    monkeypatch.setattr("drivebay.vm.snapshots.write_private", full)
    with pytest.raises(HostError, match="No space left"):
        take(world, vm)
    assert state(world) == before
    vm.snapshots.rmdir()
    vm.snapshots.touch()
    with pytest.raises(HostError, match="can't keep"):
        take(world, vm)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def monitor(vm: Vm, process: subprocess.Popen[bytes]) -> Iterator[FakeMonitor]:
    seem_to_run(vm, process)
    fake = FakeMonitor(vm.monitor_socket)
    fake.answers["query-chardev"] = [{"label": "agent", "frontend-open": False}]
    yield fake
    fake.close()


def test_a_running_one_is_held_still_and_how_it_was_is_kept(
    world: World, vm: Vm, monitor: FakeMonitor
) -> None:
    done = taking(world, vm, runs=True)
    assert done.plan.texts[0].startswith("freeze VM 'web' for a moment, and take the snapshots")
    done.plan.run()
    assert find(vm, "before").consistency.startswith("as after a power cut: the guest has no agent")


def test_a_machine_that_does_not_go_on_has_no_snapshot(
    world: World, vm: Vm, monitor: FakeMonitor
) -> None:
    monitor.answers["cont"] = Refuses("not now")
    before = state(world)
    with pytest.raises(QmpRefused):
        taking(world, vm, runs=True).plan.run()
    assert state(world) == before


def test_a_try_that_was_killed_does_not_hinder_the_next(world: World, vm: Vm) -> None:
    (vm.snapshots / ".new").mkdir(parents=True)
    (vm.snapshots / ".new/snapshot.toml").touch()
    assert all_of(vm) == []
    take(world, vm)
    assert all_of(vm) == ["before"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("taken = 1", "'taken' is 1, and should be a date and time"),
        ("nonsense", "is not TOML"),
        ("taken = 2026-01-02T03:04:05Z\nconsistency = 'x'\nvolume = [{disk = 'system'}]",
         "[[volume]] 1 has no 'volume'"),
    ],
)  # fmt: skip
def test_a_record_that_was_spoilt(world: World, vm: Vm, text: str, said: str) -> None:
    take(world, vm)
    (vm.snapshots / "before/snapshot.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        find(vm, "before")
    assert said in str(caught.value)


# ---- going back ---------------------------------------------------------------------------------


def changed(world: World, vm: Vm) -> None:
    """After the snapshot: a disk came and one left, one grew, settings and variables changed."""
    take(world, vm)
    world.volume("web-later")
    for name in ("web-system", "web-data"):
        world.target.volumes["p", name].data = {0: 7}
    world.target.bdev_lvol_resize("p/web-system", 128)
    disks = (SYSTEM, LATER)
    world.vms.save(vm, replace(vm.spec, memory=1024 * MIB, disks=disks))
    vm.firmware_variables.write_bytes(b"boot from later")
    renewal.mark(vm.folder)
    for disk in disks:
        world.target.show(f"vm.web.{disk.name}", world.inventory().disk(str(disk.bdev)).bdev)
    world.target.calls.clear()


def test_disks_settings_and_variables_are_as_they_were(world: World, vm: Vm) -> None:
    changed(world, vm)
    plan = way_back(world)
    assert plan.facts == [
        "Disk 'later' ('p/web-later') came after the snapshot: it is detached, and stays as it is."
    ]
    plan.run()
    assert plan.left == []
    assert world.vms.load("web").spec == vm.spec
    assert (vm.folder / "vm.toml").read_text() == vm.text
    assert vm.firmware_variables.read_bytes() == b"boot from system"
    assert not renewal.is_pending(vm)
    assert not vm.unfinished_revert.exists()
    for name in ("web-system", "web-data"):
        assert parent(world, name) == f"{name}@before"
    assert world.target.volumes["p", "web-system"].clusters == 64 * MIB // (4 * MIB)
    assert "p/web-later" in world.volumes()
    assert not [name for name in world.volumes() if name.endswith("@@")]
    shown = sorted(entry["ctrlr"] for entry in world.target.controllers)
    assert shown == ["vm.web.data", "vm.web.system"]


STEPS = [
    ("vhost_delete_controller", 0),
    ("vhost_create_blk_controller", 0),
    ("bdev_lvol_snapshot", 0),
    ("bdev_lvol_snapshot", 1),
    ("bdev_lvol_resize", 0),
    ("bdev_lvol_set_parent", 0),
    ("bdev_lvol_set_parent", 1),
]


@pytest.mark.parametrize(("method", "successes"), STEPS)
def test_whatever_fails_all_is_as_it_was(world: World, vm: Vm, method: str, successes: int) -> None:
    changed(world, vm)
    before = state(world)
    plan = way_back(world)
    world.target.failing_after = {method: successes}
    original = world.target._answer

    def answer(request: dict[str, object]) -> dict[str, object]:
        """It fails once, and works when all is taken back."""
        answered = original(request)
        if "error" in answered:
            world.target.failing_after = {}
        return answered

    world.target._answer = answer  # type: ignore[method-assign]
    with pytest.raises(RpcRefused, match=method):
        plan.run()
    assert plan.left == []
    assert state(world) == before
    way_back(world).run()
    assert world.vms.load("web").spec == vm.spec


@pytest.mark.parametrize("which", ["vars.fd", "vm.toml"])
def test_a_file_that_cannot_be_written_takes_all_back(
    world: World, vm: Vm, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(world, vm)
    before = state(world)
    failed: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if path == vm.folder / which and not failed:
            failed.append(path)
            raise HostError(f"can't write '{path}'", 28)
        write_private(path, data)

    monkeypatch.setattr("drivebay.vm.snapshots.write_private", write)
    plan = way_back(world)
    with pytest.raises(HostError):
        plan.run()
    assert failed
    assert plan.left == []
    assert state(world) == before


def test_what_was_moved_aside_and_stays_is_told_and_goes_at_the_next(world: World, vm: Vm) -> None:
    changed(world, vm)
    plan = way_back(world)
    world.target.failing = {"bdev_lvol_delete"}
    plan.run()
    assert [sentence.split(" stays")[0] for sentence in plan.left] == [
        "'p/web-system@@'", "'p/web-data@@'"]  # fmt: skip
    assert world.vms.load("web").spec == vm.spec
    assert not vm.unfinished_revert.exists()
    world.target.failing = set()
    way_back(world).run()
    assert not [name for name in world.volumes() if name.endswith("@@")]


@pytest.mark.parametrize("steps", range(1, 11))
def test_a_way_back_that_was_killed_is_seen_and_can_be_gone_again(
    world: World, vm: Vm, steps: int
) -> None:
    changed(world, vm)
    plan = way_back(world)
    assert len(plan._steps) == 11
    for step in plan._steps[:steps]:
        step.do()
    again = world.vms.load("web")
    if steps < 10:  # the last but one takes the mark away
        for refused in (lambda: start(world.vms, "web"),
                        lambda: own_volumes(again, world.inventory()),
                        lambda: delete(world)):  # fmt: skip
            with pytest.raises(DrivebayError, match="on its way back") as caught:
                refused()
            assert caught.value.hint == "drivebay vm revert web before"
    way_back(world).run()
    assert world.vms.load("web").spec == vm.spec
    assert not vm.unfinished_revert.exists()
    assert [parent(world, name) for name in ("web-system", "web-data")] == [
        "web-system@before", "web-data@before"]  # fmt: skip
    assert not [name for name in world.volumes() if name.endswith("@@")]


@pytest.mark.parametrize(
    ("done", "failing"),
    [(6, {"bdev_lvol_set_parent"}), (0, {"bdev_lvol_set_parent", "bdev_lvol_delete"})],
)
def test_what_cannot_be_taken_back_leaves_the_mark(
    world: World, vm: Vm, done: int, failing: set[str]
) -> None:
    changed(world, vm)
    for step in way_back(world)._steps[:done]:  # by a try that was killed
        step.do()
    plan = way_back(world)
    world.target.failing = failing
    with pytest.raises(RpcRefused):
        plan.run()
    assert vm.unfinished_revert.read_text() == "before"


def test_a_part_that_is_gone_refuses_the_whole(world: World, vm: Vm) -> None:
    changed(world, vm)
    del world.target.volumes["p", "web-data"]
    before = state(world)
    with pytest.raises(NotFound, match="its disk 'data' of then, 'p/web-data', is gone") as caught:
        way_back(world)
    assert caught.value.hint == "drivebay vm snapshot web before --delete"
    world.volume("web-data")
    way_back(world)  # one that was made anew under its name has the old snapshot still
    del world.target.volumes["p", "web-data@before"]
    world.target.bdev_lvol_snapshot("p/web-data", "web-data@before")
    with pytest.raises(NotFound, match="'p/web-data@before', was deleted"):
        way_back(world)
    assert world.target.calls == []
    assert state(world)[0] == before[0]


def test_disks_that_somebody_has_are_refused(world: World, vm: Vm) -> None:
    changed(world, vm)
    other = world.vm("other", DiskSpec("mine", "p/web-data"))
    with pytest.raises(InUse, match="'p/web-data' belongs to VM 'other'"):
        way_back(world)
    world.vms.delete(other)
    world.target.show("vhost.0", "p/web-data", sessions=1)
    with pytest.raises(InUse, match="can't be reverted under machines that are connected"):
        way_back(world)
    assert world.target.calls == []


def test_user_data_and_an_identity_to_renew_belong_to_it(world: World) -> None:
    world.pool()
    world.volume("web-system")
    vm = world.vm("web", SYSTEM, cloud_init=CloudInit("i", "web", user_data="mine"))
    (vm.folder / "mine").write_text("old")
    renewal.mark(vm.folder)
    take(world, vm)
    (vm.folder / "mine").write_text("new")
    (vm.folder / "identity-to-renew").unlink()
    way_back(world).run()
    assert (vm.folder / "mine").read_text() == "old"
    assert renewal.is_pending(vm)


def test_a_newer_one_from_which_nobody_reads_is_one_still_after_a_restart(
    world: World, vm: Vm
) -> None:
    take(world, vm, "one")
    take(world, vm, "two")
    way_back(world, "one").run()
    assert parent(world, "web-system") == "web-system@one"
    world.target.lone = {"web-system@two", "web-data@two"}
    assert [disk.name for disk in world.inventory().disks] == ["web-system", "web-data"]
    way_back(world, "two").run()
    assert parent(world, "web-system") == "web-system@two"


# ---- deleting -----------------------------------------------------------------------------------


def test_a_deleted_one_leaves_the_disks(world: World, vm: Vm) -> None:
    take(world, vm)
    delete(world)
    assert all_of(vm) == []
    assert world.volumes() == ["p/web-data", "p/web-system"]
    with pytest.raises(NotFound, match="has no snapshot 'before'"):
        find(vm, "before")
    take(world, vm)


def test_a_deletion_that_fails_in_the_middle_is_done_again(world: World, vm: Vm) -> None:
    take(world, vm)
    world.target.failing_after = {"bdev_lvol_delete": 1}
    with pytest.raises(RpcRefused):
        delete(world)
    assert all_of(vm) == ["before"]
    with pytest.raises(NotFound, match="was deleted"):
        way_back(world)
    world.target.failing_after = {}
    delete(world)
    assert world.volumes() == ["p/web-data", "p/web-system"]


def test_one_that_others_read_from_stays(world: World, vm: Vm) -> None:
    take(world, vm)
    world.target.bdev_lvol_clone("p/web-data@before", "copy")
    with pytest.raises(InUse, match="2 disks and snapshots read from 'web-data@before'"):
        delete(world)
    assert all_of(vm) == ["before"]
    assert "p/web-system@before" in world.volumes()


def test_one_from_which_a_newer_goes_on_beside_the_disk_stays(world: World, vm: Vm) -> None:
    take(world, vm, "one")
    take(world, vm, "two")
    way_back(world, "one").run()
    with pytest.raises(InUse, match="both the disk and the snapshot 'two' go on") as caught:
        delete(world, "one")
    assert caught.value.hint == "that one first: drivebay vm snapshot web two --delete"
    delete(world, "two")
    delete(world, "one")
    assert world.volumes() == ["p/web-data", "p/web-system"]
