"""Configuration files that SPDK wrote, in our target: with -c, and by SPDK's client.

tests/data/spdk_saved.json is what SPDK's vhost saved with malloc, null, aio and uring bdevs
and vhost-blk controllers; FOLDER stands for the folder of the image files.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import TargetProcess

spdk_rpc = pytest.importorskip("spdk.rpc.client")
spdk_config = pytest.importorskip("spdk.rpc.config")

SAVED = (Path(__file__).parents[1] / "data" / "spdk_saved.json").read_text()
WHOLE = (Path(__file__).parents[1] / "data" / "spdk_save_config.json").read_text()
VOLUME = "f2101097-0021-4617-a8f1-4c2e4867b095"
RBD = {"method": "bdev_rbd_create", "params": {"pool_name": "p", "rbd_name": "r"}}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        path = Path(name)
        for image in ("aio0.img", "uring0.img"):
            with (path / image).open("wb") as file:
                file.truncate(64 * 1024 * 1024)
        yield path


def spdks(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(SAVED.replace("FOLDER", str(folder)))
    return config


def write(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "vhost.json"
    path.write_text(json.dumps(config))
    return str(path)


def saved_by(target: TargetProcess) -> dict[str, Any]:
    text = io.StringIO()
    client = spdk_rpc.JSONRPCClient(str(target.rpc_path))
    spdk_config.save_config(client, text)
    client.close()
    config: dict[str, Any] = json.loads(text.getvalue())
    return config


def calls(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every call with its parameters, in order, but what waits for nothing here."""
    return [
        (call["method"], call.get("params", {}))
        for subsystem in config["subsystems"]
        for call in subsystem["config"] or []
    ]


def check_that_it_is_all_here(target: TargetProcess, config: dict[str, Any]) -> None:
    """Whatever SPDK saved, we save as well, with the same values where we have them."""
    ours = saved_by(target)
    # Settings may move before bdevs; bdevs and controllers keep their order.
    assert sorted(method for method, _ in calls(ours)) == sorted(
        method for method, _ in calls(config)
    )
    theirs = {key_of(method, params): params for method, params in calls(config)}
    for method, params in calls(ours):
        expected = theirs[key_of(method, params)]
        for name, value in params.items():
            assert expected[name] == value, f"{method}: {name}"


def key_of(method: str, params: dict[str, Any]) -> tuple[str, Any]:
    return method, params.get("name") or params.get("ctrlr") or params.get("impl_name")


def test_spdks_file_starts_our_target(folder: Path) -> None:
    config = spdks(folder)
    target = TargetProcess(folder, "-c", write(folder, config))
    try:
        check_that_it_is_all_here(target, config)
    finally:
        assert target.stop() == 0


def test_spdks_client_loads_spdks_file(folder: Path) -> None:
    config = spdks(folder)
    target = TargetProcess(folder, "--wait-for-rpc")
    try:
        client = spdk_rpc.JSONRPCClient(str(target.rpc_path))
        spdk_config.load_config(client, io.StringIO(json.dumps(config)))
        client.close()
        check_that_it_is_all_here(target, config)
    finally:
        assert target.stop() == 0


def test_a_part_that_is_lacking_ends_the_start_with_its_name(folder: Path) -> None:
    config = spdks(folder)
    next(part for part in config["subsystems"] if part["subsystem"] == "bdev")["config"].insert(
        1, RBD
    )
    command = [sys.executable, "-m", "drivebay", "vhost", "-S", str(folder), "-m", "0x1"]
    command += ["-r", str(folder / "rpc.sock"), "-c", write(folder, config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    for part in ("entry 2", "'bdev'", "bdev_rbd_create", "Ceph RBD"):
        assert part in done.stderr
    assert "--json-ignore-init-errors" in done.stderr
    left = {path.name for path in folder.iterdir()}
    assert left == {"aio0.img", "uring0.img", "vhost.json"}


def test_ignoring_errors_goes_on_without_it_and_autosave_keeps_it(folder: Path) -> None:
    config = spdks(folder)
    next(part for part in config["subsystems"] if part["subsystem"] == "bdev")["config"].insert(
        1, RBD
    )
    file = write(folder, config)
    target = TargetProcess(folder, "-c", file, "--json-ignore-init-errors", "--autosave")
    try:
        assert len(target.rpc("vhost_get_controllers")) == 3
        assert "Ceph RBD" in target.log()
        target.rpc("bdev_null_create", name="N", num_blocks=8, block_size=512)
        kept = calls(json.loads(Path(file).read_text()))
        assert (RBD["method"], RBD["params"]) in kept
        assert "N" in [params.get("name") for _, params in kept]
    finally:
        assert target.stop() == 0


def whole_file(folder: Path, methods: list[str]) -> dict[str, Any]:
    """SPDK's configuration of one of each, as far as we have the parts.

    It names a volume by a uuid that SPDK drew when it was made; ours has the same alias.
    """
    text = WHOLE.replace("RUN/", f"{folder}/").replace(VOLUME, "lvs0/l1")
    config: dict[str, Any] = json.loads(text)
    for subsystem in config["subsystems"]:
        subsystem["config"] = [
            call
            for call in subsystem["config"] or []
            if call["method"] in methods
            and (
                call.get("params", {}).get("dev_name") != "lvs0/l1" or "bdev_lvol_create" in methods
            )
        ]
    return config


def test_spdks_file_with_one_of_each_starts_our_target(folder: Path) -> None:
    """No error is ignored: whatever we have of it must load, and be saved again."""
    image = folder / "aio_lvs.img"
    with image.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    target = TargetProcess(folder)
    methods = target.rpc("rpc_get_methods")
    if "bdev_lvol_create" in methods:
        target.rpc("bdev_aio_create", name="AioLvs", filename=str(image), block_size=4096)
        target.rpc("bdev_lvol_create_lvstore", bdev_name="AioLvs", lvs_name="lvs0")
        target.rpc("bdev_lvol_create", lvs_name="lvs0", lvol_name="l1", size_in_mib=8)
    assert target.stop() == 0
    config = whole_file(folder, methods)
    target = TargetProcess(folder, "-c", write(folder, config))
    try:
        ours = {(method, key_of(method, params)[1]) for method, params in calls(saved_by(target))}
        theirs = {(method, key_of(method, params)[1]) for method, params in calls(config)}
        assert theirs <= ours
        names = {bdev["name"] for bdev in target.rpc("bdev_get_bdevs")}
        assert {"Malloc0", "Null0", "Aio0", "Uring0", "MSp3", "PT0", "D0", "EE_MSp2"} <= names
    finally:
        assert target.stop() == 0
