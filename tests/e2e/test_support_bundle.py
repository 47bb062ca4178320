"""The support bundle: of a target that answers, of one that is stopped, of none at all."""

from __future__ import annotations

import json
import os
import signal
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.command_line import drivebay
from tests.fakes.process import TargetProcess


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@pytest.fixture
def target(folder: Path) -> Iterator[TargetProcess]:
    process = TargetProcess(folder)
    yield process
    process.kill()


def read(path: Path) -> dict[str, str]:
    """The archive's files by their path below its one folder."""
    with tarfile.open(path) as archive:
        found = {}
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            assert file is not None
            folder, _, name = entry.name.partition("/")
            assert folder.startswith("drivebay-bundle-")
            found[name] = file.read().decode()
    return found


def bundle(folder: Path, *words: str) -> Any:
    """The command, told where the RPC socket is; its state folder holds no other target."""
    return drivebay(
        *("target", "status", "--bundle", str(folder / "b.tar.gz"), *words),
        *("-s", str(folder / "rpc.sock")),
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
    )


def test_a_running_target(folder: Path, target: TargetProcess) -> None:
    target.malloc("M0")
    target.controller("vhost.0", "M0")
    # The log shows requests with their parameters; secrets in them must not get out.
    target.rpc("log_set_flag", flag="log_rpc")
    target.rpc("log_set_print_level", level="ERROR")
    with pytest.raises(Exception, match="-32601"):
        target.rpc("bdev_nvme_set_keys", name="C0", key="c0ffee11", psk="deadbeef")
    done = bundle(folder, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["pid"] == target.pid
    assert answer["answered"] is True
    path = folder / "b.tar.gz"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = read(path)
    assert sorted(files) == answer["files"]
    diagnostics = json.loads(files["rpc/drivebay_get_diagnostics.json"])
    assert diagnostics["state"] == "runtime"
    assert diagnostics["options"]["cores"] == [0]
    assert diagnostics["options"]["rpc_socket"] == str(target.rpc_path)
    assert diagnostics["standstills"] == []
    assert [found["core"] for found in diagnostics["reactors"]] == [0]
    saved = json.loads(files["rpc/save_config.json"])
    calls = [call["method"] for part in saved["subsystems"] for call in part["config"]]
    assert "bdev_malloc_create" in calls
    assert "vhost_create_blk_controller" in calls
    for method, mark in (("bdev_get_iostat", "M0"), ("vhost_get_controllers", "vhost.0")):
        assert mark in files[f"rpc/{method}.json"]
    assert "NOTICE target.app: ready" in files["log/recent.log"]
    assert "bdev_nvme_set_keys" in files["log/recent.log"]
    everything = "\n".join(files.values())
    assert "c0ffee11" not in everything
    assert "deadbeef" not in everything
    assert files["host/proc/meminfo"].startswith("MemTotal")
    assert "Cpus_allowed" in files[f"process/task/{target.pid}/status"]
    assert "rpc.sock" in files["process/cmdline"]
    assert "socket:" in files["process/fd"]


def test_a_target_that_is_stopped(folder: Path, target: TargetProcess) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    done = bundle(folder)
    os.kill(target.pid, signal.SIGCONT)
    assert done.returncode == 3
    assert "was not answered within 5 s" in done.stderr
    assert "hint: " in done.stderr
    files = read(folder / "b.tar.gz")
    assert "The target did not answer" in files["README"]
    assert not [name for name in files if name.startswith("rpc/")]
    assert "State:\tT (stopped)" in files["process/status"]
    threads = {name.split("/")[2] for name in files if name.startswith("process/task/")}
    assert len(threads) >= 2, "control and a reactor"
    assert all(f"process/task/{thread}/wchan" in files for thread in threads)
    assert "host/proc/meminfo" in files
    target.rpc("spdk_get_version")  # nothing happened to it


def test_no_target_at_all(folder: Path) -> None:
    done = bundle(folder)
    assert done.returncode == 3
    assert "can't reach a target" in done.stderr
    files = read(folder / "b.tar.gz")
    assert "host/uname" in files
    assert "process not found" in files["README"]


def test_a_file_is_never_replaced(folder: Path) -> None:
    (folder / "b.tar.gz").write_text("mine")
    done = bundle(folder)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert (folder / "b.tar.gz").read_text() == "mine"


def test_a_folder_that_is_not_there(folder: Path) -> None:
    words = ("target", "status", "--bundle", str(folder / "none" / "b"), "-s", str(folder / "r"))
    done = drivebay(*words)
    assert done.returncode == 1
    assert "can't write the bundle" in done.stderr
    assert list(folder.iterdir()) == []
