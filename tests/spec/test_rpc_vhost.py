"""vhost's methods where SPDK hangs, cuts or loses: here they answer, and say why."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Kind, Session, Status
from tests.fakes.process import RpcError, TargetProcess, wait_until
from tests.fakes.rpc_client import exchange


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        process.malloc("M0")
        yield process
        assert process.stop() == 0


def error_of(target: TargetProcess, method: str, **params: Any) -> dict[str, Any]:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    answer = json.loads(exchange(target.rpc_path, json.dumps(request).encode()))
    error: dict[str, Any] = answer["error"]
    return error


def sessions(target: TargetProcess, name: str) -> list[dict[str, Any]]:
    (found,) = target.rpc("vhost_get_controllers", name=name)
    listed: list[dict[str, Any]] = found["sessions"]
    return listed


def test_deleting_a_connected_controller_answers_at_once(target: TargetProcess) -> None:
    path = target.controller("vhost.0", "M0")
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(path))
        wait_until(lambda: len(sessions(target, "vhost.0")) == 1, "a session")
        error = error_of(target, "vhost_delete_controller", ctrlr="vhost.0")
        assert (error["code"], error["message"]) == (-16, "Device or resource busy")
        assert "force" in error["data"]["hint"]
        assert len(sessions(target, "vhost.0")) == 1
        assert target.rpc("vhost_delete_controller", ctrlr="vhost.0", force=True) is True
        front_end.settimeout(10)
        assert front_end.recv(1) == b"", "the session must have ended"
    assert target.rpc("vhost_get_controllers") == []
    assert not path.exists()


def test_a_socket_path_that_is_too_long_is_refused(target: TargetProcess) -> None:
    error = error_of(target, "vhost_create_blk_controller", ctrlr="x" * 120, dev_name="M0")
    assert error["code"] == -32602
    assert "107" in error["data"]["reason"]
    assert target.rpc("vhost_get_controllers") == []


@pytest.mark.parametrize("name", ["a/b", "..", ".", ""])
def test_a_name_that_leads_elsewhere_is_refused(target: TargetProcess, name: str) -> None:
    error = error_of(target, "vhost_create_blk_controller", ctrlr=name, dev_name="M0")
    assert error["code"] == -32602
    assert error["message"] in ("Input/output error", "Invalid argument")


def test_a_file_at_the_socket_path_stays(target: TargetProcess) -> None:
    (target.folder / "plainfile").write_text("precious")
    error = error_of(target, "vhost_create_blk_controller", ctrlr="plainfile", dev_name="M0")
    assert (error["code"], error["message"]) == (-32602, "Input/output error")
    assert (target.folder / "plainfile").read_text() == "precious"


@pytest.mark.parametrize("cpumask", ["0xf0", "", "zzz", "[9]", "0x0", "[]"])
def test_cores_without_a_reactor_are_refused(target: TargetProcess, cpumask: str) -> None:
    error = error_of(
        target, "vhost_create_blk_controller", ctrlr="v", dev_name="M0", cpumask=cpumask
    )
    assert (error["code"], error["message"]) == (-32602, "Invalid argument")
    assert error["data"]["field"] == "cpumask"


def test_a_controller_is_listed_and_saved_as_spdk_does(target: TargetProcess) -> None:
    path = target.controller("vhost.1", "M0", cpumask="[0]", readonly=True)
    assert target.rpc("vhost_get_controllers", name="vhost.1") == [
        {
            "ctrlr": "vhost.1",
            "cpumask": "0x1",
            "delay_base_us": 0,
            "iops_threshold": 60000,
            "socket": str(path),
            "sessions": [],
            "backend_specific": {
                "block": {"readonly": True, "bdev": "M0", "transport": "vhost_user_blk"}
            },
        }
    ]
    assert target.rpc("framework_get_config", name="vhost_blk") == [
        {
            "method": "vhost_create_blk_controller",
            "params": {
                "ctrlr": "vhost.1",
                "dev_name": "M0",
                "cpumask": "1",
                "readonly": True,
                "transport": "vhost_user_blk",
            },
        }
    ]
    target.rpc("vhost_delete_controller", ctrlr="vhost.1")


def test_a_bdev_may_go_while_a_controller_has_it(target: TargetProcess) -> None:
    target.malloc("M9")
    target.controller("vhost.9", "M9")
    target.rpc("bdev_malloc_delete", name="M9")
    (found,) = target.rpc("vhost_get_controllers", name="vhost.9")
    assert found["backend_specific"]["block"]["bdev"] is None
    assert target.rpc("framework_get_config", name="vhost_blk") == []
    target.malloc("M9")
    (found,) = target.rpc("vhost_get_controllers", name="vhost.9")
    assert found["backend_specific"]["block"]["bdev"] is None, "a new bdev of the name is another"
    target.rpc("vhost_delete_controller", ctrlr="vhost.9")


def image_of(target: TargetProcess, name: str) -> Path:
    path = target.folder / name
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


def test_a_file_is_free_again_while_its_guest_stays_connected(target: TargetProcess) -> None:
    image = image_of(target, "gone.img")
    target.rpc("bdev_aio_create", name="A0", filename=str(image), block_size=512)
    path = target.controller("vhost.a", "A0")
    with Session(str(path)) as guest:
        disk = guest.disk
        disk.write(0, b"\x5a" * 512)
        assert target.rpc("bdev_aio_delete", name="A0") is True
        done = disk.request(Kind.IN, 0, room=512)
        assert done.status == Status.IOERR
        # No lock is left on it: the same file makes a new disk at once.
        target.rpc("bdev_aio_create", name="A0", filename=str(image), block_size=512)
        assert len(sessions(target, "vhost.a")) == 1
    assert image.read_bytes()[:512] == b"\x5a" * 512
    target.rpc("vhost_delete_controller", ctrlr="vhost.a", force=True)
    target.rpc("bdev_aio_delete", name="A0")


def test_a_file_grows_and_may_not_shrink_under_a_guest(target: TargetProcess) -> None:
    image = image_of(target, "grows.img")
    target.rpc("bdev_uring_create", name="U0", filename=str(image), block_size=512)
    path = target.controller("vhost.u", "U0")
    with Session(str(path)) as guest:
        disk = guest.disk
        with image.open("r+b") as file:
            file.truncate(32 << 20)
        target.rpc("bdev_uring_rescan", name="U0")
        disk.write((32 << 20) // 512 - 1, b"\xa5" * 512)
        with image.open("r+b") as file:
            file.truncate(8 << 20)
        error = error_of(target, "bdev_uring_rescan", name="U0")
        assert (error["code"], error["message"]) == (-16, "Device or resource busy")
        (bdev,) = target.rpc("bdev_get_bdevs", name="U0")
        assert bdev["num_blocks"] == (32 << 20) // 512
    target.rpc("vhost_delete_controller", ctrlr="vhost.u", force=True)
    # The session may still be draining when its controller is gone.
    wait_until(lambda: shrinks(target, "U0"), "the last user to let go of the bdev")
    (bdev,) = target.rpc("bdev_get_bdevs", name="U0")
    assert bdev["num_blocks"] == (8 << 20) // 512
    target.rpc("bdev_uring_delete", name="U0")


def shrinks(target: TargetProcess, name: str) -> bool:
    try:
        return target.rpc("bdev_uring_rescan", name=name) is True
    except RpcError as error:
        if error.code != -16:
            raise
        return False


def test_counters_count_and_are_reset_by_mode(target: TargetProcess) -> None:
    target.malloc("C0")
    target.forget_examining("C0")
    path = target.controller("vhost.c", "C0")
    with Session(str(path)) as guest:
        disk = guest.disk
        for sector in range(4):
            disk.write(sector, b"\x11" * 512)
        disk.read(0, 2048)
        (found,) = target.rpc("bdev_get_iostat", names=["C0"])["bdevs"]
        assert (found["num_write_ops"], found["bytes_written"]) == (4, 2048)
        assert (found["num_read_ops"], found["bytes_read"]) == (1, 2048)
        channels = target.rpc("bdev_get_iostat", names=["C0"], per_channel=True)["channels"]
        assert [channel["num_write_ops"] for channel in channels] == [4]
        threads = [thread["id"] for thread in target.rpc("thread_get_stats")["threads"]]
        assert channels[0]["thread_id"] in threads
        # Of these two only the second one clears the number of operations.
        target.rpc("bdev_reset_iostat", name="C0", mode="maxmin")
        (found,) = target.rpc("bdev_get_iostat", names=["C0"], reset_mode="all")["bdevs"]
        assert found["num_write_ops"] == 4
        (found,) = target.rpc("bdev_get_iostat", names=["C0"])["bdevs"]
        assert found["num_write_ops"] == found["write_latency_ticks"] == 0
    target.rpc("vhost_delete_controller", ctrlr="vhost.c", force=True)
    target.rpc("bdev_malloc_delete", name="C0")
