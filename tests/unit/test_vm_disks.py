"""vm/disks.py: disks made and deleted, their sockets, and who may write; the target is a model."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.disks.connection import RpcRefused
from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, InUse, NotFound, StateError, UsageError
from drivebay.vm import disks
from drivebay.vm.disks import (
    check_way,
    check_writers,
    controller_name,
    ensure_controller,
    inventory_when_let_go,
    plan_clone_of_image,
    plan_closing_of_image,
    plan_deletion,
    plan_empty_disk,
    remove_controller,
)
from drivebay.vm.images.store import Images
from drivebay.vm.spec import DiskSpec
from drivebay.vm.store import Vm
from tests.unit.vm_world import MIB, World, bare

NOBODY = 65534


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


# ---- making -------------------------------------------------------------------------------------


def test_a_clone_of_an_image(world: World, pool: str) -> None:
    image = world.image()
    plan = Plan()
    plan_clone_of_image(plan, world.client, world.inventory(), image, "p", "web-system", None)
    assert len(plan.texts) == 2
    plan.run()
    assert world.target.calls == [
        (
            "bdev_aio_create",
            {"name": "image-debian", "filename": str(image.path), "block_size": 512,
             "readonly": True, "uuid": image.uuid},
        ),
        (
            "bdev_lvol_clone_bdev",
            {"bdev": image.uuid, "lvs_name": "p", "clone_name": "web-system"},
        ),
    ]  # fmt: skip
    again = Plan()
    plan_clone_of_image(again, world.client, world.inventory(), image, "p", "b", image.size)
    assert len(again.texts) == 1, "the image is open"
    larger = Plan()
    plan_clone_of_image(
        larger, world.client, world.inventory(), image, "p", "c", image.size + 4 * MIB + 1
    )
    larger.run()
    assert world.target.calls[-1] == ("bdev_lvol_resize", {"name": "p/c", "size_in_mib": 13})


@pytest.mark.parametrize("failing", ["bdev_lvol_clone_bdev", "bdev_lvol_resize"])
def test_a_clone_of_an_image_that_fails_leaves_nothing(
    world: World, pool: str, failing: str
) -> None:
    world.target.failing.add(failing)
    plan = Plan()
    plan_clone_of_image(plan, world.client, world.inventory(), world.image(), "p", "x", 64 * MIB)
    with pytest.raises(RpcRefused, match=failing):
        plan.run()
    assert (world.volumes(), plan.left) == ([], [])
    assert list(world.target.bases) == ["pool-p"]


def test_an_image_that_was_open_stays_so(world: World, pool: str) -> None:
    image = world.image()
    world.target.bdev_aio_create("by-hand", str(image.path), uuid=image.uuid)
    world.target.failing.add("bdev_lvol_clone_bdev")
    plan = Plan()
    plan_clone_of_image(plan, world.client, world.inventory(), image, "p", "x", None)
    with pytest.raises(RpcRefused):
        plan.run()
    assert "by-hand" in world.target.bases


def test_a_disk_smaller_than_its_image(world: World, pool: str) -> None:
    image = world.image(size=8 * MIB)
    with pytest.raises(UsageError, match="'debian' needs 8 MiB, and a disk of 7 MiB") as caught:
        plan_clone_of_image(Plan(), world.client, world.inventory(), image, "p", "x", 7 * MIB)
    assert caught.value.hint == "--disk 8M, or more"


def test_an_empty_disk(world: World, pool: str) -> None:
    plan = Plan()
    plan_empty_disk(plan, world.client, world.inventory(), "p", "x", MIB + 1)
    plan.run()
    assert world.target.calls == [
        (
            "bdev_lvol_create",
            {"lvol_name": "x", "size_in_mib": 2, "thin_provision": True, "lvs_name": "p"},
        )
    ]


def test_an_empty_disk_is_taken_back(world: World, pool: str) -> None:
    plan = Plan()
    plan_empty_disk(plan, world.client, world.inventory(), "p", "x", MIB)
    plan.add("fail", lambda: remove_from_nothing())
    with pytest.raises(KeyError):
        plan.run()
    assert world.volumes() == []


def remove_from_nothing() -> None:
    raise KeyError


def test_names_and_sizes_that_no_disk_has(world: World, pool: str) -> None:
    world.volume("x")
    world.pool("q")
    inventory = world.inventory()
    with pytest.raises(AlreadyExists, match="a disk 'x' in pool 'p' already") as caught:
        plan_empty_disk(Plan(), world.client, inventory, "p", "x", MIB)
    assert caught.value.hint == "drivebay disk info p/x"
    plan_empty_disk(Plan(), world.client, inventory, "q", "x", MIB)
    with pytest.raises(AlreadyExists):
        plan_clone_of_image(Plan(), world.client, inventory, world.image(), "p", "x", None)
    for name in ("a b", "a/b", "a@b", "", "x" * 64):
        with pytest.raises(UsageError):
            plan_empty_disk(Plan(), world.client, inventory, "p", name, MIB)
    with pytest.raises(UsageError, match="at least 1 MiB"):
        plan_empty_disk(Plan(), world.client, inventory, "p", "y", MIB - 1)


# ---- deleting -----------------------------------------------------------------------------------


def delete(world: World, name: str) -> None:
    """Delete the disk p/NAME that was made for a VM."""
    plan = Plan()
    plan_deletion(plan, world.client, world.inventory(), "web", DiskSpec("d", bdev=f"p/{name}"))
    plan.run()


def clone(world: World, name: str, new: str, mark: str) -> None:
    """As `vm clone` does it."""
    world.target.bdev_lvol_snapshot(f"p/{name}", f"{name}@{mark}")
    world.target.bdev_lvol_clone(f"p/{name}@{mark}", new)


def left(world: World) -> list[str]:
    return [name.removeprefix("p/") for name in world.volumes()]


ONE, TWO, THREE = "clone-00000001", "clone-00000002", "clone-00000003"


def test_a_disk_goes_and_one_that_is_gone_is_no_reason(world: World, pool: str) -> None:
    world.volume("a")
    world.volume("b")
    delete(world, "a")
    delete(world, "a")
    assert left(world) == ["b"]


def test_the_snapshot_goes_with_the_clone(world: World, pool: str) -> None:
    world.volume("a")
    clone(world, "a", "b", ONE)
    delete(world, "b")
    assert left(world) == ["a"]


def test_the_snapshot_goes_with_the_original(world: World, pool: str) -> None:
    world.volume("a")
    clone(world, "a", "b", ONE)
    delete(world, "a")
    assert left(world) == ["b"]
    assert world.target.volumes["p", "b"].parent is None


def test_a_snapshot_of_two_clones_goes_with_the_last_but_one(world: World, pool: str) -> None:
    world.volume("a")
    clone(world, "a", "b", ONE)
    world.target.bdev_lvol_clone(f"p/a@{ONE}", "c")
    delete(world, "a")
    assert left(world) == [f"a@{ONE}", "b", "c"]
    delete(world, "c")
    assert left(world) == ["b"]


@pytest.mark.parametrize("order", list(itertools.permutations("abcd")))
def test_clones_one_after_the_other_go_in_any_order(
    world: World, pool: str, order: tuple[str, ...]
) -> None:
    """Each clone has a snapshot below it, and the newer ones stand on the older."""
    world.volume("a")
    clone(world, "a", "b", ONE)
    clone(world, "a", "c", TWO)
    clone(world, "b", "d", THREE)
    for number, name in enumerate(order):
        delete(world, name)
        disks = [each for each in left(world) if "@" not in each]
        assert disks == sorted(order[number + 1 :])
        assert len(left(world)) <= max(0, 2 * len(disks) - 1), "a snapshot has two readers"
    assert left(world) == []


def test_a_clone_of_a_clone(world: World, pool: str) -> None:
    world.volume("a")
    clone(world, "a", "b", ONE)
    clone(world, "b", "c", TWO)
    delete(world, "b")
    assert left(world) == ["a", f"a@{ONE}", "c"]
    delete(world, "c")
    assert left(world) == ["a"]


def test_the_snapshots_that_people_made_go_with_their_disk(world: World, pool: str) -> None:
    world.volume("a")
    world.target.bdev_lvol_snapshot("p/a", "a@old")
    world.target.bdev_lvol_snapshot("p/a", "a@new")
    delete(world, "a")
    assert left(world) == []


def test_those_of_another_disk_stay(world: World, pool: str) -> None:
    world.volume("a")
    world.target.bdev_lvol_snapshot("p/a", "a@old")
    clone(world, "a", "b", ONE)
    delete(world, "b")
    assert left(world) == ["a", "a@old"]


@pytest.mark.parametrize("mark", ["clone-base", "clone-0000000g", "clone-000000011", "base"])
def test_one_that_a_person_called_so_stays(world: World, pool: str, mark: str) -> None:
    world.volume("a")
    clone(world, "a", "b", mark)
    delete(world, "b")
    assert left(world) == ["a", f"a@{mark}"]


def test_a_snapshot_without_a_disks_name_stays(world: World, pool: str) -> None:
    world.volume("a")
    clone(world, "a", "b", ONE)
    world.target.bdev_lvol_snapshot("p/b", "golden")
    delete(world, "b")
    assert left(world) == ["a", f"a@{ONE}", "golden"]


def test_a_persons_snapshot_goes_with_its_last_reader(world: World, pool: str) -> None:
    world.volume("a")
    world.target.bdev_lvol_snapshot("p/a", "a@old")
    clone(world, "a", "b", ONE)
    delete(world, "a")
    assert left(world) == ["a@old", "b"]
    delete(world, "b")
    assert left(world) == []


def test_a_disk_on_which_something_stands_is_not_deleted(world: World, pool: str) -> None:
    world.volume("a")
    uuid = world.target.volumes["p", "a"].uuid
    world.target.stores["nested"] = ("u", uuid, 1)
    world.target.bases[uuid] = replace(world.target.bases["pool-p"], name="nested-base")
    inventory = world.inventory()
    claimed = replace(inventory.disk("p/a"), claimed=True)
    volumes = tuple(claimed if each.name == "a" else each for each in inventory.volumes)
    with pytest.raises(InUse, match="another bdev stands on the disk 'p/a'"):
        plan_deletion(
            Plan(), world.client, replace(inventory, volumes=volumes), "web",
            DiskSpec("d", bdev="p/a"),
        )  # fmt: skip


def test_a_disk_that_somebody_else_shows_is_not_deleted(world: World, pool: str) -> None:
    world.volume("a")
    world.target.show("vm.web.d", "p/a")
    delete(world, "a")
    world.volume("a")
    world.target.show("mine", "p/a")
    with pytest.raises(InUse, match="controller 'mine' shows the disk 'p/a', too") as caught:
        delete(world, "a")
    assert '{"ctrlr": "mine"}' in str(caught.value.hint)
    assert left(world) == ["a"]


def test_an_image_is_closed_with_its_last_clone(world: World, pool: str) -> None:
    image = world.image()
    for name in ("a", "b"):
        plan = Plan()
        plan_clone_of_image(plan, world.client, world.inventory(), image, "p", name, None)
        plan.run()
    for name, open_then in (("a", True), ("b", False)):
        delete(world, name)
        plan = Plan()
        plan_closing_of_image(plan, world.client, Images().get("debian"))
        plan.run()
        assert ("image-debian" in world.target.bases) == open_then
        plan.run()


def test_an_image_that_is_shown_stays_open(world: World, pool: str) -> None:
    image = world.image()
    world.target.bdev_aio_create("by-hand", str(image.path))
    world.target.show("mine", "by-hand")
    plan = Plan()
    plan_closing_of_image(plan, world.client, image)
    plan.run()
    assert "by-hand" in world.target.bases


# ---- controllers --------------------------------------------------------------------------------


def ensure(world: World, uid: int | None = None, mask: str | None = None) -> Path:
    world.target.calls.clear()
    disk = DiskSpec("d", bdev="p/x")
    return ensure_controller(world.client, "web", disk, world.inventory(), uid, mask)


def test_a_socket_is_made_and_stays(world: World, pool: str) -> None:
    world.volume("x")
    uuid = world.target.volumes["p", "x"].uuid
    assert ensure(world) == world.folder / "vm.web.d"
    wanted = {"ctrlr": "vm.web.d", "dev_name": uuid, "serial": "d"}
    assert world.target.calls == [("vhost_create_blk_controller", wanted)]
    assert ensure(world) == world.folder / "vm.web.d"
    assert world.target.calls == []


def test_the_user_and_the_cores_are_named(world: World, pool: str, needs_root: None) -> None:
    world.volume("x")
    world.folder.chmod(0o711)
    ensure(world, NOBODY, "0x4")
    ((_, wanted),) = world.target.calls
    assert (wanted["socket_uid"], wanted["cpumask"]) == (NOBODY, "0x4")
    ensure(world, NOBODY)
    assert world.target.calls == []
    ensure(world, NOBODY + 1)
    assert world.target.names() == ["vhost_delete_controller", "vhost_create_blk_controller"]


@pytest.mark.parametrize("wrong", ["bdev", "socket", "kind"])
def test_one_that_is_otherwise_is_made_anew(world: World, pool: str, wrong: str) -> None:
    world.volume("x")
    world.volume("y")
    uuid = world.target.volumes["p", "x"].uuid
    world.target.show("vm.web.d", "p/y" if wrong == "bdev" else uuid)
    if wrong == "socket":
        world.target.controllers[0]["socket"] = "/nonexistent/socket"
        (world.folder / "vm.web.d").touch()
    if wrong == "kind":
        world.target.controllers[0]["backend_specific"] = {"scsi": []}
    ensure(world)
    assert world.target.names() == ["vhost_delete_controller", "vhost_create_blk_controller"]
    assert world.target.controllers[0]["backend_specific"]["block"]["bdev"] == uuid


def test_one_in_use_is_left_alone(world: World, pool: str) -> None:
    world.volume("x")
    world.target.show("vm.web.d", "p/y", 1)
    with pytest.raises(InUse, match=r"controller 'vm\.web\.d' is in use") as caught:
        ensure(world)
    assert world.target.calls == []
    assert '{"ctrlr": "vm.web.d"}' in str(caught.value.hint)


def test_a_socket_is_taken_away_if_there_is_one(world: World, pool: str) -> None:
    remove_controller(world.client, "web", "d")
    assert world.target.calls == []
    world.target.show("vm.web.d", "p/x", 1)
    with pytest.raises(RpcRefused, match="busy"):
        remove_controller(world.client, "web", "d")
    remove_controller(world.client, "web", "d", force=True)
    assert world.target.controllers == []


def test_the_way_to_a_socket(world: World) -> None:
    folder = world.folder / "a" / "b"
    folder.mkdir(parents=True)
    uid = os.geteuid() + 1
    for place in (world.folder, folder.parent, folder):
        place.chmod(0o711)
    check_way(folder / "s", uid)
    folder.parent.chmod(0o770)
    with pytest.raises(StateError, match=rf"user {uid}, who may not pass .*/a' to the socket 's'"):
        check_way(folder / "s", uid)
    folder.parent.chmod(0o711)
    world.folder.chmod(0o700)
    with pytest.raises(StateError, match="may not pass"):
        check_way(folder / "s", uid)


def test_names_of_controllers() -> None:
    assert controller_name("web", "system") == "vm.web.system"


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
