"""SPDK's own client from PyPI, unmodified, drives a real target: create, list, save, restart, load.

The client is the judge: whatever it prints and returns must be what it would with SPDK.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import TargetProcess

spdk_rpc = pytest.importorskip("spdk.rpc.client")
spdk_config = pytest.importorskip("spdk.rpc.config")

SPDK_RPC = Path(sysconfig.get_path("scripts")) / "spdk-rpc"
MIB = 1024 * 1024
UUID = "0a0a0a0a-0000-4000-8000-000000000001"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@pytest.fixture
def target(folder: Path) -> Iterator[TargetProcess]:
    process = TargetProcess(folder)
    yield process
    process.kill()


def client_of(target: TargetProcess) -> Any:
    return spdk_rpc.JSONRPCClient(str(target.rpc_path))


def spdk(target: TargetProcess, *words: str, feed: str | None = None) -> str:
    """Run spdk-rpc as a person would; what it printed."""
    command = [sys.executable, str(SPDK_RPC), "-s", str(target.rpc_path), *words]
    done = subprocess.run(command, input=feed, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(target: TargetProcess, *words: str) -> dict[str, Any]:
    """Run spdk-rpc, which must fail; the error that it printed."""
    command = [sys.executable, str(SPDK_RPC), "-s", str(target.rpc_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Got JSON-RPC error response" in done.stdout
    error: dict[str, Any] = json.loads(done.stdout.partition("response:")[2])
    return error


def make_images(target: TargetProcess) -> tuple[str, str]:
    paths = []
    for name in ("aio.img", "uring.img"):
        with (target.folder / name).open("wb") as file:
            file.truncate(16 * MIB)
        paths.append(str(target.folder / name))
    return paths[0], paths[1]


def make_disks(target: TargetProcess) -> None:
    """A bdev of each kind and controllers on them, by the client's Python methods."""
    aio, uring = make_images(target)
    client = client_of(target)
    client.bdev_malloc_create(name="Malloc0", uuid=UUID, num_blocks=131072, block_size=512)
    client.bdev_null_create(name="Null0", num_blocks=32768, block_size=4096)
    client.bdev_aio_create(name="Aio0", filename=aio, block_size=512)
    client.bdev_uring_create(name="Uring0", filename=uring)
    client.vhost_create_blk_controller(ctrlr="vhost.0", dev_name="Malloc0", cpumask="0x1")
    client.vhost_create_blk_controller(ctrlr="vhost.1", dev_name=UUID, readonly=True)
    client.vhost_create_blk_controller(ctrlr="vhost.2", dev_name="Uring0")
    client.close()


def saved(target: TargetProcess) -> dict[str, Any]:
    text = io.StringIO()
    client = client_of(target)
    spdk_config.save_config(client, text)
    client.close()
    config: dict[str, Any] = json.loads(text.getvalue())
    return config


def test_the_client_lists_what_it_made(target: TargetProcess) -> None:
    aio, uring = make_images(target)
    made = spdk(target, "bdev_malloc_create", "-b", "Malloc0", "-u", UUID, "64", "512")
    assert made == "Malloc0\n"
    assert spdk(target, "bdev_null_create", "Null0", "128", "4096") == "Null0\n"
    assert spdk(target, "bdev_aio_create", aio, "Aio0", "512") == "Aio0\n"
    assert spdk(target, "bdev_uring_create", uring, "Uring0") == "Uring0\n"
    spdk(target, "vhost_create_blk_controller", "vhost.0", "Malloc0", "--cpumask", "0x1")
    spdk(target, "vhost_create_blk_controller", "-r", "vhost.1", UUID)
    spdk(target, "vhost_create_blk_controller", "vhost.2", "Uring0")
    bdevs = json.loads(spdk(target, "bdev_get_bdevs"))
    assert [(bdev["name"], bdev["product_name"], bdev["block_size"]) for bdev in bdevs] == [
        ("Malloc0", "Malloc disk", 512),
        ("Null0", "Null disk", 4096),
        ("Aio0", "AIO disk", 512),
        ("Uring0", "URING bdev", bdevs[3]["block_size"]),
    ]
    (found,) = json.loads(spdk(target, "bdev_get_bdevs", "-b", UUID))
    assert found["name"] == "Malloc0"
    controllers = json.loads(spdk(target, "vhost_get_controllers"))
    assert [controller["ctrlr"] for controller in controllers] == ["vhost.0", "vhost.1", "vhost.2"]
    assert controllers[1]["backend_specific"]["block"] == {
        "readonly": True,
        "bdev": "Malloc0",
        "transport": "vhost_user_blk",
    }
    for controller in controllers:
        assert Path(controller["socket"]).is_socket()
    for words in (
        ("bdev_get_iostat",),
        ("bdev_get_iostat", "--names", "Malloc0"),
        ("framework_get_reactors",),
        ("thread_get_stats",),
        ("framework_get_scheduler",),
        ("log_get_flags",),
        ("notify_get_notifications",),
        ("virtio_blk_get_transports",),
    ):
        json.loads(spdk(target, *words))


def test_the_client_prints_our_refusals(target: TargetProcess) -> None:
    error = refused(target, "bdev_get_bdevs", "-b", "nosuch")
    assert (error["code"], error["message"]) == (-19, "No such device")
    error = refused(target, "vhost_create_blk_controller", "vc", "nosuch")
    assert (error["code"], error["message"]) == (-32602, "No such device")
    error = refused(target, "bdev_aio_create", "/nonexistent", "A0", "512")
    assert (error["code"], error["message"]) == (-2, "No such file or directory")
    error = refused(target, "vhost_controller_set_coalescing", "vhost.0", "1", "1000")
    assert (error["code"], error["message"]) == (-32602, "No such device")
    error = refused(target, "bdev_rbd_create", "pool", "image", "512")
    assert (error["code"], error["message"]) == (-32601, "Method not found")
    assert "Ceph RBD" in error["data"]["reason"]
    long_name = "x" * 200
    spdk(target, "bdev_null_create", "N", "16", "512")
    error = refused(target, "vhost_create_blk_controller", long_name, "N")
    assert error["code"] == -32602
    assert json.loads(spdk(target, "vhost_get_controllers")) == []


def test_save_restart_load(target: TargetProcess, folder: Path) -> None:
    make_disks(target)
    before = saved(target)
    names = [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")]
    file = folder / "vhost.json"
    file.write_text(spdk(target, "save_config"))
    assert json.loads(file.read_text()) == before
    spdk(target, "spdk_kill_instance", "SIGTERM")
    assert target.process.wait(30) == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_socket()) == []

    again = TargetProcess(folder, "-c", str(file))
    try:
        assert saved(again) == before
        assert [bdev["name"] for bdev in again.rpc("bdev_get_bdevs")] == names
        assert len(again.rpc("vhost_get_controllers")) == 3
    finally:
        assert again.stop() == 0


def test_load_config_into_a_target_that_waits(target: TargetProcess, folder: Path) -> None:
    make_disks(target)
    before = saved(target)
    assert target.stop() == 0
    again = TargetProcess(folder, "--wait-for-rpc")
    try:
        assert spdk(again, "load_config", feed=json.dumps(before)) == ""
        assert saved(again) == before
        spdk(again, "framework_wait_init")
    finally:
        assert again.stop() == 0


def test_one_subsystem_is_saved_and_loaded(target: TargetProcess) -> None:
    spdk(target, "bdev_null_create", "N0", "16", "512")
    text = spdk(target, "save_subsystem_config", "-n", "bdev")
    spdk(target, "bdev_null_delete", "N0")
    # bdev_set_options is for the startup state; the client leaves it out and says so.
    assert "skipped" in spdk(target, "load_subsystem_config", feed=text)
    assert json.loads(spdk(target, "bdev_get_bdevs", "-b", "N0"))
    assert refused(target, "save_subsystem_config", "-n", "nosuch")["code"] == -32602


def test_a_batch_of_the_client(target: TargetProcess) -> None:
    client = spdk_rpc.JSONRPCClient(str(target.rpc_path), batch_mode=True)
    calls = [
        {"method": "bdev_null_create", "params": {"name": n, "num_blocks": 8, "block_size": 512}}
        for n in ("B0", "B1", "B0")
    ]
    results, errors = client.call_batch(calls)
    client.close()
    assert results == ["B0", "B1"]
    assert [error["code"] for error in errors] == [-17]


def test_hot_remove_and_resize_as_the_client_sees_them(target: TargetProcess) -> None:
    make_disks(target)
    image = target.folder / "uring.img"
    with image.open("r+b") as file:
        file.truncate(32 * MIB)
    spdk(target, "bdev_uring_rescan", "Uring0")
    (grown,) = json.loads(spdk(target, "bdev_get_bdevs", "-b", "Uring0"))
    assert grown["num_blocks"] * grown["block_size"] == 32 * MIB
    spdk(target, "bdev_null_resize", "Null0", "256")
    spdk(target, "bdev_malloc_delete", "Malloc0")
    (controller,) = json.loads(spdk(target, "vhost_get_controllers", "-n", "vhost.0"))
    assert controller["backend_specific"]["block"]["bdev"] is None
    config = json.loads(spdk(target, "save_subsystem_config", "-n", "vhost_blk"))["config"]
    assert [call["params"]["ctrlr"] for call in config] == ["vhost.2"]
    events = json.loads(spdk(target, "notify_get_notifications"))
    kinds = [(event["type"], event["ctx"]) for event in events]
    assert ("bdev_resize", "Uring0") in kinds
    assert ("bdev_unregister", "Malloc0") in kinds
    spdk(target, "vhost_delete_controller", "vhost.0")


def test_memory_is_bounded_by_s(folder: Path) -> None:
    process = TargetProcess(folder, "-s", "64")
    try:
        spdk(process, "bdev_malloc_create", "-b", "M0", "48", "512")
        error = refused(process, "bdev_malloc_create", "-b", "M1", "32", "512")
        assert (error["code"], error["message"]) == (-12, "Cannot allocate memory")
        assert "-s 64" in error["data"]["reason"]
        spdk(process, "bdev_malloc_delete", "M0")
        spdk(process, "bdev_malloc_create", "-b", "M1", "32", "512")
    finally:
        process.stop()


def test_the_version_says_what_clients_look_for(target: TargetProcess) -> None:
    version = json.loads(spdk(target, "spdk_get_version"))
    assert "SPDK v26.09" in version["version"]
    assert version["version"].startswith("Drivebay v")
    assert (version["fields"]["major"], version["fields"]["minor"]) == (26, 9)


def test_autosave_loses_nothing(folder: Path) -> None:
    file = folder / "auto.json"
    process = TargetProcess(folder, "-c", str(file), "--autosave")
    make_disks(process)
    spdk(process, "bdev_null_delete", "Null0")
    before = saved(process)
    process.kill()  # as a crash would
    assert json.loads(file.read_text()) == before
    again = TargetProcess(folder, "-c", str(file), "--autosave")
    try:
        assert saved(again) == before
    finally:
        again.stop()
