"""Disks whose code somebody brings, in a real target: loaded, served, saved, refused, removed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from drivebay.bdev.python_bdev import PythonBdev
from drivebay.engines.vhost_user_client import RequestFailed, VhostUserBlk
from tests.fakes.driver import Kind, Session
from tests.fakes.memory import Layout
from tests.fakes.process import RpcError, TargetProcess

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "http_disk.py"
MIB = 1 << 20

MEMORY_DISK = """
import errno, time
from drivebay.bdev.python_disk import PythonDisk

class MemoryDisk(PythonDisk):
    threads = 2

    def __init__(self, mebibytes, slow=0.0):
        self.content = bytearray(mebibytes << 20)
        self.num_blocks = len(self.content) // self.block_size
        self.slow = slow

    def read(self, offset, length):
        time.sleep(self.slow)
        return self.content[offset:offset + length]

    def write(self, offset, data):
        time.sleep(self.slow)
        if offset >= 1 << 20:
            raise OSError(errno.ENOSPC, "the second half is full")
        self.content[offset:offset + len(data)] = data

class NoDisk:
    pass
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "memory_disk.py"
    path.write_text(MEMORY_DISK)
    path.chmod(0o644)
    tmp_path.chmod(0o755)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[TargetProcess]:
    folder = tmp_path / "target"
    folder.mkdir()
    target = TargetProcess(folder)
    try:
        yield target
        assert target.stop() == 0, target.log()[-4000:]
    finally:
        target.kill()


def create(target: TargetProcess, path: Path, **more: object) -> None:
    given: dict[str, Any] = {"module": str(path), "class": "MemoryDisk", "name": "P0"}
    given["params"] = {"mebibytes": 2}
    target.rpc("drivebay_bdev_python_create", **(given | more))


def test_a_disk_from_a_file_is_served_saved_and_removed(
    target: TargetProcess, module: Path, tmp_path: Path
) -> None:
    create(target, module)
    [shown] = target.rpc("bdev_get_bdevs", name="P0")
    assert (shown["num_blocks"], shown["product_name"]) == (4096, "Python disk")
    assert shown["driver_specific"]["python"]["class"] == "MemoryDisk"
    with VhostUserBlk(str(target.controller("c0", "P0"))) as disk:
        disk.write(4096, b"drivebay" * 1024)
        assert disk.read(4096, 8192) == b"drivebay" * 1024
        mark = target.mark()
        for _ in range(2):
            with pytest.raises(RequestFailed):
                disk.write(MIB, bytes(512))
        assert disk.read(4096, 8192) == b"drivebay" * 1024
    target.wait_for_line("Python disk 'P0': write failed with OSError.*ENOSPC", mark)
    assert target.log().count("Traceback") == 1
    [call] = [
        call for call in saved_calls(target) if call["method"] == "drivebay_bdev_python_create"
    ]
    assert call["params"] == {
        "name": "P0",
        "module": str(module),
        "class": "MemoryDisk",
        "params": {"mebibytes": 2},
        "uuid": shown["uuid"],
    }
    target.rpc("vhost_delete_controller", ctrlr="c0")
    target.rpc("drivebay_bdev_python_delete", name="P0")
    assert target.rpc("bdev_get_bdevs") == []
    target.rpc(call["method"], **call["params"])
    [again] = target.rpc("bdev_get_bdevs")
    assert again == shown | {
        "driver_specific": {"python": {"class": "MemoryDisk", "threads": 2, "failed_calls": 0}}
    }


def saved_calls(target: TargetProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = target.rpc("framework_get_config", name="bdev")
    return found


def test_what_may_not_run_here_is_refused(
    target: TargetProcess, module: Path, tmp_path: Path
) -> None:
    def refused(code: int, **more: object) -> None:
        with pytest.raises(RpcError) as caught:
            create(target, module, **more)
        assert caught.value.code == code
        assert target.rpc("bdev_get_bdevs") == []
        assert not any(c["method"].startswith("drivebay") for c in saved_calls(target))

    refused(-22, **{"class": "NoDisk"})
    refused(-22, **{"class": "Missing"})
    refused(-22, params={"wrong": 1})
    refused(-22, params={"mebibytes": 0})
    refused(-22, module="memory_disk.py")
    refused(-2, module=str(tmp_path / "none.py"))
    refused(-22, module=str(tmp_path))
    refused(-22, num_blocks=5, block_size=7)
    for path, mode in ((module, 0o666), (module, 0o664), (tmp_path, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        refused(-22)
        path.chmod(before)
    module.write_text("raise SystemExit(7)")
    refused(-22)
    module.write_text("def broken(:")
    refused(-22)
    with pytest.raises(RpcError):
        target.rpc("drivebay_bdev_python_delete", name="P0")
    module.write_text(MEMORY_DISK)
    create(target, module, num_blocks=8)
    with pytest.raises(RpcError) as caught:
        create(target, module)
    assert caught.value.code == -17


def test_a_monitor_that_takes_its_memory_away_ends_only_its_session(
    target: TargetProcess, module: Path
) -> None:
    """Its requests are in Python code, or their data is being copied, meanwhile."""
    create(target, module, params={"mebibytes": 2, "slow": 0.1})
    create(target, module, name="P1", params={"mebibytes": 2})
    mark = target.mark()
    with Session(target.controller("c0", "P0"), layouts=(Layout(0, 4 * MIB),)) as session:
        for n in range(8):
            kind, data, room = (Kind.OUT, b"\x5a" * 32768, 0) if n % 2 else (Kind.IN, b"", 32768)
            session.disk.queue(kind, 64 * n, data, room)
        session.disk.publish()
        for region in session.memory.regions:
            os.ftruncate(region.fd, 0)
        target.wait_for_line("'c0.* ends: ", mark)
        session.disk.forget()
    target.expect_alive()
    with VhostUserBlk(str(target.controller("c1", "P1"))) as disk:
        disk.write(0, b"x" * 4096)
        assert disk.read(0, 4096) == b"x" * 4096
    target.rpc("vhost_delete_controller", ctrlr="c0")
    target.rpc("drivebay_bdev_python_delete", name="P0")
    assert "Traceback" not in target.log()


def test_the_example_on_the_page_is_a_disk() -> None:
    page = (ROOT / "docs" / "bdev" / "python.md").read_text()
    made: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], made)
    disk = made["Numbers"]()
    assert disk.read(4096, 512) == b"".join(n.to_bytes(8, "little") for n in range(4096, 4608, 8))
    assert PythonBdev("N0", None, disk).io_types == {"read"}


class _Ranges(BaseHTTPRequestHandler):
    """A web server that knows ranges, as real ones do."""

    content = bytes(range(256)) * 4096

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        body = self.content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_example_serves_what_a_web_server_has(target: TargetProcess, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    copy = tmp_path / EXAMPLE.name  # the clone may be writable by others
    copy.write_text(EXAMPLE.read_text())
    copy.chmod(0o600)
    tmp_path.chmod(0o700)
    try:
        target.rpc(
            "drivebay_bdev_python_create",
            **{"name": "H0", "module": str(copy), "class": "HttpDisk"},
            params={"url": f"http://127.0.0.1:{server.server_port}/disk.img"},
        )
        with VhostUserBlk(str(target.controller("c0", "H0"))) as disk:
            assert disk.capacity_bytes == MIB
            assert disk.read(0, MIB) == _Ranges.content
            assert disk.read(MIB - 512, 512) == _Ranges.content[-512:]
        server.shutdown()
        server.server_close()
        with VhostUserBlk(str(target.folder / "c0")) as disk, pytest.raises(RequestFailed):
            disk.read(0, 512)
        target.rpc("vhost_delete_controller", ctrlr="c0")
    finally:
        server.server_close()
        serving.join()
