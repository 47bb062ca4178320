"""A whole target with a mirror on files: killed in the middle of a rebuild, and what follows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.fakes.process import TargetProcess, wait_until

MIB = 1 << 20
SIZE = 8 * MIB
SB_BYTES = MIB
UUIDS = {name: str(UUID(int=n + 1)) for n, name in enumerate(("m0", "m1"))}


def members(target: TargetProcess, folder: Path, order: str) -> None:
    for n in order:
        name = f"m{n}"
        path = str(folder / f"{name}.img")
        target.rpc("bdev_aio_create", name=name, filename=path, block_size=512, uuid=UUIDS[name])
        target.rpc("bdev_wait_for_examine")


def mirror(target: TargetProcess) -> dict[str, Any]:
    (found,) = target.rpc("bdev_raid_get_bdevs", category="all")
    assert isinstance(found, dict)
    return found


def whole(target: TargetProcess) -> bool:
    found = mirror(target)
    return "process" not in found and found["num_base_bdevs_operational"] == 2


@pytest.mark.parametrize("order", ["01", "10"])
def test_a_killed_target_begins_its_rebuild_anew(tmp_path: Path, order: str) -> None:
    """Whichever member is there first."""
    content = random.Random(7).randbytes(SIZE)
    (tmp_path / "m0.img").write_bytes(bytes(SB_BYTES) + content)
    (tmp_path / "m1.img").write_bytes(bytes(SB_BYTES + SIZE))
    target = TargetProcess(tmp_path)
    members(target, tmp_path, "01")
    target.rpc(
        "bdev_raid_create", name="md", raid_level="1", base_bdevs=["m0", "m1"], superblock=True
    )
    target.rpc("bdev_raid_remove_base_bdev", name="m1")
    target.rpc("bdev_raid_set_options", process_max_bandwidth_mb_sec=8)
    target.rpc("bdev_raid_add_base_bdev", raid_bdev="md", base_bdev="m1")
    wait_until(lambda: mirror(target)["process"]["progress"]["blocks"] > 0, "some progress")
    progress = mirror(target)["process"]
    assert progress["target"] == "m1"
    assert progress["progress"]["blocks"] < SIZE // 512
    target.kill()

    again = TargetProcess(tmp_path)
    members(again, tmp_path, order)
    wait_until(lambda: mirror(again)["state"] == "online", "the mirror")
    wait_until(lambda: whole(again), "the end of the rebuild")
    assert again.stop() == 0
    for name in ("m0", "m1"):
        assert (tmp_path / f"{name}.img").read_bytes()[SB_BYTES:] == content

    last = TargetProcess(tmp_path)
    members(last, tmp_path, order)
    assert whole(last)
    assert [base["is_configured"] for base in mirror(last)["base_bdevs_list"]] == [True, True]
    assert last.stop() == 0
