"""vm/disks.py: disks made and deleted, and their sockets; the target is a model."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.disks.connection import RpcRefused
from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, InUse, StateError, UsageError
from drivebay.vm.disks import (
    check_way,
    controller_name,
    ensure_controller,
    plan_clone_of_image,
    plan_closing_of_image,
    plan_deletion,
    plan_empty_disk,
    remove_controller,
)
from drivebay.vm.images.store import Images
from drivebay.vm.spec import DiskSpec
from tests.unit.vm_world import MIB, World

NOBODY = 65534


@pytest.fixture
def pool(world: World) -> str:
    return world.pool()


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
    ensure(world, NOBODY, "4")
    assert world.target.calls == []
    ensure(world, NOBODY, "0x8")
    assert world.target.names() == ["vhost_delete_controller", "vhost_create_blk_controller"]
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
