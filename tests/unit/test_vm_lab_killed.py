"""vm/lab: what an `up` that failed, or was killed or interrupted, has left is gone on with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivebay.errors import DrivebayError, NotFound, StateError
from drivebay.vm.lab.record import Labs
from tests.unit.vm_lab_world import LAB, SMALL, Killed, LabWorld, LastStep, refused
from tests.unit.vm_world import World


@pytest.fixture
def lab(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabWorld]:
    made = LabWorld(world, monkeypatch)
    yield made
    made.close()


@pytest.mark.parametrize(
    "method",
    ["bdev_lvol_create_lvstore", "bdev_lvol_create", "bdev_split_create", "bdev_lvol_clone_bdev",
     "vhost_create_blk_controller"],
)  # fmt: skip
def test_a_failed_up_leaves_whole_things_and_the_next_goes_on(lab: LabWorld, method: str) -> None:
    lab.world.target.failing_after[method] = 0 if method == "bdev_lvol_create_lvstore" else 1
    if method == "bdev_split_create":
        lab.world.target.failing.add(method)
    with pytest.raises(DrivebayError, match="Input/output error"):
        lab.up()
    record = Labs().load("four")
    assert record is None or all(thing.finished for thing in record.things.values())
    lab.world.target.failing.clear()
    lab.world.target.failing_after.clear()
    lab.up()
    made = lab.picture()
    assert lab.up() == []
    lab.delete()
    lab.up()
    assert lab.picture() == made


def killed_at(lab: LabWorld, monkeypatch: pytest.MonkeyPatch, act: str, step: int) -> bool:
    """Whether an `up` or a delete was killed at that step, and not done before."""
    with monkeypatch.context() as patch:
        LastStep(patch, step)
        try:
            lab.up(SMALL) if act == "up" else lab.delete()
        except Killed:
            lab.killed()
            return True
    return False


def delete(lab: LabWorld) -> None:
    """All that there is; the image is no lab's."""
    lab.stop()
    if Labs().load("four") is not None:
        lab.delete()
    lab.world.target.bases.pop("image-tiny", None)


def test_an_up_that_is_killed_at_any_step_is_gone_on_with(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up(SMALL)
    whole = lab.picture()
    delete(lab)
    step = 0
    while killed_at(lab, monkeypatch, "up", step):
        lab.up(SMALL)
        assert lab.picture() == whole, f"killed at step {step}"
        record = Labs().load("four")
        assert record is not None
        assert all(thing.finished for thing in record.things.values()), f"killed at step {step}"
        assert lab.plan(None).plan.texts == [], f"killed at step {step}"
        delete(lab)
        step += 1
    assert step > 60, "some steps were not counted"


def test_an_up_that_is_interrupted_is_gone_on_with(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up(SMALL)
    whole = lab.picture()
    delete(lab)
    for step in range(0, 80, 5):
        with monkeypatch.context() as patch:
            LastStep(patch, step, how=KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                lab.up(SMALL)
        lab.up(SMALL)
        assert lab.picture() == whole, f"interrupted at step {step}"
        delete(lab)


def test_a_vm_that_does_not_start_keeps_no_other_from_it(lab: LabWorld) -> None:
    lab.failing = {"four-web-1", "four-other"}
    with pytest.raises(StateError, match="VM 'four-web-1': no port; and so .* four-other") as told:
        lab.up()
    assert told.value.hint == "another port"
    assert lab.started == ["four-web-2"]
    lab.failing.clear()
    assert lab.up() == ["start VMs four-web-1, four-other"]


def test_what_an_up_that_is_killed_at_any_step_has_left_can_be_deleted(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.file.write_text(SMALL)
    empty = lab.picture()
    step = 0
    while killed_at(lab, monkeypatch, "up", step):
        delete(lab)
        assert lab.picture() == empty, f"killed at step {step}"
        step += 1


def test_a_delete_that_is_killed_at_any_step_is_gone_on_with(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.file.write_text(SMALL)
    empty = lab.picture()
    step = 0
    lab.up(SMALL)
    lab.stop()
    while killed_at(lab, monkeypatch, "delete", step):
        delete(lab)
        assert lab.picture() == empty, f"killed at step {step}"
        lab.up(SMALL)
        lab.stop()
        step += 1
    assert step > 40, "some steps were not counted"


def test_a_target_that_has_lost_its_configuration_gets_files_again(
    lab: LabWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up()
    target = lab.world.target
    stores, volumes = dict(target.stores), dict(target.volumes)
    whole = lab.picture()
    target.bases.clear()
    target.stores.clear()
    target.volumes.clear()
    create = target.bdev_aio_create

    def create_and_examine(name: str, filename: str, **more: object) -> str:
        result = create(name, filename, **more)  # type: ignore[arg-type]
        if name == "pool-four-big":
            target.stores.update(stores)
            target.volumes.update(volumes)
        return result

    monkeypatch.setattr(target, "bdev_aio_create", create_and_examine)
    done = lab.up()
    assert done == [
        f"open pool 'four-big' on '{lab.folder / 'big.img'}' again",
        f"open '{lab.folder / 'own.img'}' as the disk 'four-own' again",
        "split disk 'four-own' into 2 parts",
    ]
    target.bases["image-tiny"] = target.bases["four-own"]
    assert lab.picture() == whole
    target.bases.clear()
    target.stores.clear()
    target.volumes.clear()
    (lab.folder / "big.img").unlink()
    assert "--recreate big" in refused(lab, NotFound, "which is not there any more", LAB)


def test_a_vm_that_somebody_deleted_is_made_again(lab: LabWorld) -> None:
    lab.up()
    vm = lab.world.vms.load("four-other")
    lab.world.vms.delete(vm)
    assert lab.up()[0].startswith("make VM 'four-other'")
