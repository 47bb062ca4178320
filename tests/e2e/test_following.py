"""`drivebay rpc` on a terminal: a bar for what takes long, and its end. On a disk that is slow."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Session
from tests.fakes.process import RpcError, TargetProcess, wait_until

MIB = 1 << 20
SLOW_MB = 10


class Shell:
    """Runs `drivebay rpc` with standard error on a terminal of its own."""

    def __init__(self, target: TargetProcess) -> None:
        self._target = target

    def rpc(self, method: str, **params: Any) -> tuple[int, Any, str]:
        """Returns: the exit code, the result, what the terminal saw."""
        words = [sys.executable, "-m", "drivebay", "rpc", "-s", str(self._target.rpc_path)]
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [*words, method, json.dumps(params)], stdout=subprocess.PIPE, stderr=theirs
        ) as running:
            os.close(theirs)
            seen = b""
            while True:
                try:
                    seen += os.read(ours, 4096)
                except OSError:  # EIO: the other end is closed
                    break
            os.close(ours)
            out, _ = running.communicate()
        return running.returncode, json.loads(out), seen.decode()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[TargetProcess]:
    made = TargetProcess(tmp_path)
    yield made
    assert made.stop() == 0


@pytest.fixture
def shell(target: TargetProcess) -> Shell:
    return Shell(target)


def volume_on_a_snapshot(target: TargetProcess) -> None:
    """s/v, which has nothing of its own any more: 24 of its 32 MiB are s/snap's."""
    target.malloc("m", 96)
    target.rpc("bdev_lvol_create_lvstore", bdev_name="m", lvs_name="s", cluster_sz=MIB)
    volume = {"lvol_name": "v", "size_in_mib": 32, "lvs_name": "s", "thin_provision": True}
    target.rpc("bdev_lvol_create", **volume)
    with Session(target.controller("vhost.0", "s/v")) as session:
        for number in range(24):
            session.disk.write(number * MIB // 512, bytes([number + 1]) * 4096)
    wait_until(
        lambda: not target.rpc("vhost_get_controllers", name="vhost.0")[0]["sessions"],
        "no session",
    )
    target.rpc("vhost_delete_controller", ctrlr="vhost.0")
    target.rpc("bdev_lvol_snapshot", lvol_name="s/v", snapshot_name="snap")


def slow(target: TargetProcess, name: str) -> None:
    target.rpc("bdev_set_qos_limit", name=name, w_mbytes_per_sec=SLOW_MB)


def test_an_inflate_shows_a_bar_and_its_result(target: TargetProcess, shell: Shell) -> None:
    volume_on_a_snapshot(target)
    slow(target, "m")
    code, result, seen = shell.rpc("bdev_lvol_inflate", name="s/v")
    assert (code, result) == (0, True)
    assert "copying s/v [" in seen
    assert "%" in seen
    (found,) = target.rpc("bdev_get_bdevs", name="s/v")
    assert found["driver_specific"]["lvol"]["num_allocated_clusters"] == 32


def test_a_refused_inflate_says_why_and_shows_no_bar(target: TargetProcess) -> None:
    words = [sys.executable, "-m", "drivebay", "rpc", "-s", str(target.rpc_path)]
    done = subprocess.run(
        [*words, "bdev_lvol_inflate", '{"name": "nobody"}'], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "bdev_lvol_inflate" in done.stderr
    assert "[" not in done.stderr


def test_a_shallow_copy_is_followed_to_its_end(target: TargetProcess, shell: Shell) -> None:
    volume_on_a_snapshot(target)
    target.malloc("copy", 32)
    slow(target, "copy")
    code, result, seen = shell.rpc(
        "bdev_lvol_start_shallow_copy", src_lvol_name="s/snap", dst_bdev_name="copy"
    )
    assert code == 0
    assert "copying [" in seen
    with Session(target.controller("vhost.1", "copy")) as session:
        assert session.disk.read(23 * MIB // 512, 4096) == bytes([24]) * 4096
    # Its end was seen, so the target has forgotten it.
    with pytest.raises(RpcError):
        target.rpc("bdev_lvol_check_shallow_copy", **result)


def test_a_rebuild_is_followed_to_its_end(target: TargetProcess, shell: Shell) -> None:
    for name in ("a", "b"):
        target.malloc(name, 32)
    target.rpc("bdev_raid_create", name="md", raid_level="1", base_bdevs=["a", "b"])
    target.rpc("bdev_raid_remove_base_bdev", name="b")
    slow(target, "b")
    code, result, seen = shell.rpc("bdev_raid_add_base_bdev", raid_bdev="md", base_bdev="b")
    assert (code, result) == (0, True)
    assert "rebuilding md [" in seen
    (found,) = target.rpc("bdev_raid_get_bdevs", category="all")
    assert "process" not in found
    assert found["num_base_bdevs_operational"] == 2
