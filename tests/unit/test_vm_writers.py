"""vm/disks.py: who writes to a disk, by the VMs' vm.toml and by the target's sessions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.errors import InUse, NotFound, UsageError
from drivebay.vm import disks
from drivebay.vm.disks import check_writers, inventory_when_let_go
from drivebay.vm.spec import DiskSpec
from drivebay.vm.store import Vm
from tests.unit.vm_world import World, bare


@pytest.fixture
def pool(world: World) -> str:
    return world.pool()


def holder(name: str, *bdevs: str, shared: bool = False) -> Vm:
    """Another VM with disks a, b …"""
    specs = [
        DiskSpec(letter, bdev=bdev, shared=shared)
        for letter, bdev in zip("abc", bdevs, strict=False)
    ]
    return Vm(Path(), bare(name, *specs), "")


def check(world: World, *vms: Vm, bdev: str = "p/x", shared: bool = False) -> None:
    check_writers("web", DiskSpec("d", bdev=bdev, shared=shared), world.inventory(), vms)


# ---- who writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_second_writer_needs_the_word_of_both(
    world: World, pool: str, ours: bool, theirs: bool
) -> None:
    world.volume("x")
    others = [holder("a", "p/y"), holder("db", "p/y", "p/x", shared=theirs)]
    if ours and theirs:
        check(world, *others, shared=True)
        return
    with pytest.raises(InUse, match=r"'p/x' belongs to VM 'db' \(its disk 'b'\)") as caught:
        check(world, *others, shared=ours)
    assert "drivebay disk clone p/x NEW" in str(caught.value.hint)
    assert "'shared = true'" in str(caught.value.hint)


def test_all_who_have_it_must_say_so(world: World, pool: str) -> None:
    world.volume("x")
    with pytest.raises(InUse, match="VM 'b'"):
        check(world, holder("a", "p/x", shared=True), holder("b", "p/x"), shared=True)


def test_one_disk_has_several_names(world: World, pool: str) -> None:
    world.volume("x")
    uuid = world.target.volumes["p", "x"].uuid
    for ours, theirs in itertools.permutations(("p/x", "x", uuid), 2):
        with pytest.raises(InUse, match="VM 'db'"):
            check(world, holder("db", theirs), bdev=ours)


def test_a_name_of_two_pools_is_nobodys(world: World, pool: str) -> None:
    world.volume("x")
    world.pool("q")
    world.volume("x", "q")
    check(world, holder("a", "x"), holder("b", "gone"), holder("c", "q/x"))


def test_a_vm_has_a_disk_once(world: World, pool: str) -> None:
    world.volume("x")
    spec = DiskSpec("d", bdev="p/x")
    own = Vm(Path(), bare("web", spec, DiskSpec("e", bdev="p/y")), "")
    check(world, own)
    twice = Vm(Path(), bare("web", spec, DiskSpec("e", bdev="p/x")), "")
    with pytest.raises(InUse, match=r"belongs to VM 'web' \(its disk 'e'\)"):
        check(world, twice)


def test_a_snapshot_has_no_writer(world: World, pool: str) -> None:
    world.volume("x")
    world.target.bdev_lvol_snapshot("p/x", "x@old")
    with pytest.raises(UsageError, match="'p/x@old' is a snapshot") as caught:
        check(world, bdev="p/x@old", shared=True)
    assert caught.value.hint == "drivebay disk clone p/x@old NEW, and use that"


def test_what_a_pool_stands_on_has_no_writer(world: World, pool: str) -> None:
    with pytest.raises(InUse, match="another bdev stands on 'pool-p'"):
        check(world, bdev="pool-p", shared=True)


def test_no_such_disk(world: World, pool: str) -> None:
    with pytest.raises(NotFound, match="no disk 'p/gone'"):
        check(world, bdev="p/gone")


@pytest.mark.parametrize("sessions", [0, 1, 2])
def test_sessions_of_others_count(world: World, pool: str, sessions: int) -> None:
    world.volume("x")
    world.target.show("mine", world.target.volumes["p", "x"].uuid, sessions)
    check(world, shared=True)
    if sessions == 0:
        check(world)
        return
    plural = "s" if sessions == 2 else ""
    said = f"controller 'mine' has {sessions} connected session{plural}$"
    with pytest.raises(InUse, match=said):
        check(world)


def test_ones_own_session_does_not_count(world: World, pool: str) -> None:
    world.volume("x")
    world.target.show("vm.web.d", "p/x", 1)
    check(world)


def test_a_session_of_another_disk_of_ours_counts(world: World, pool: str) -> None:
    world.volume("x")
    world.target.show("vm.web.e", "p/x", 1)
    with pytest.raises(InUse, match=r"controller 'vm\.web\.e'"):
        check(world)


def test_the_session_of_a_vm_that_shares_it_does_not_count(world: World, pool: str) -> None:
    world.volume("x")
    world.target.show("vm.db.a", "p/x", 1)
    check(world, holder("db", "p/x", shared=True), shared=True)


def test_a_vm_that_runs_on_what_its_toml_no_longer_names_counts(world: World, pool: str) -> None:
    world.volume("x")
    world.target.show("vm.db.a", "p/x", 1)
    with pytest.raises(InUse, match=r"controller 'vm\.db\.a' has 1 connected session"):
        check(world, holder("db", "p/y"))


# ---- a VM that is off and yet connected ---------------------------------------------------------


def test_a_qemu_that_has_just_ended_lets_go(
    world: World, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.volume("x")
    world.target.show("vm.web.d", "p/x", 1)
    spec = DiskSpec("d", bdev="p/x")

    def let_go(seconds: float) -> None:
        world.target.controllers[0]["sessions"] = []

    monkeypatch.setattr("drivebay.vm.disks.time.sleep", let_go)
    assert inventory_when_let_go(world.client, "web", [spec]).disk("p/x").sessions == 0


def test_a_qemu_without_a_record_is_named(
    world: World, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.volume("x")
    world.target.show("vm.web.d", "p/x", 1)
    world.target.show("vm.webb.d", "p/x", 1)
    monkeypatch.setattr(disks, "LETTING_GO_SECONDS", 0.0)
    spec = DiskSpec("d", bdev="p/x")
    with pytest.raises(InUse, match=r"'web' is off, and yet .* 'vm\.web\.d'") as caught:
        inventory_when_let_go(world.client, "web", [spec])
    assert "pgrep -af guest=web" in str(caught.value.hint)
    inventory_when_let_go(world.client, "web", [replace(spec, name="e")])
