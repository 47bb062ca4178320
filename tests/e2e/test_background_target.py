"""A target in the background: `drivebay target start`, `status`, `stop`, and who refuses when."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.command_line import (
    CONTROLLER,
    MALLOC,
    WAIT_S,
    configuration,
    drivebay,
    names,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets; pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@contextlib.contextmanager
def background(folder: Path) -> Iterator[dict[str, str]]:
    """An environment with folders of its own; what runs at FOLDER/r is ended."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "XDG_DATA_HOME": f"{folder}/data"}
    try:
        yield environment
    finally:
        drivebay("target", "stop", "--force", "-s", f"{folder}/r", env=environment)


def test_the_life_of_a_background_target(folder: Path) -> None:
    rpc_socket = str(folder / "r")
    with background(folder) as env:
        started = drivebay("target", "start", "-r", rpc_socket, env=env)
        assert started.returncode == 0, started.stderr
        assert rpc_socket in started.stdout
        twice = drivebay("target", "start", "-r", rpc_socket, env=env)
        assert twice.returncode == 1
        assert "a background target runs already: process " in twice.stderr
        assert "hint: drivebay target stop" in twice.stderr
        # Every command finds it without being told where it is.
        created = drivebay("rpc", "bdev_malloc_create", json.dumps(MALLOC["params"]), env=env)
        assert json.loads(created.stdout) == "M0"
        drivebay("rpc", "vhost_create_blk_controller", json.dumps(CONTROLLER["params"]), env=env)
        words = drivebay("completion", "words", "--", "rpc", "bdev_malloc_", env=env)
        assert set(words.stdout.split()) == {"bdev_malloc_create", "bdev_malloc_delete"}
        status = json.loads(drivebay("target", "status", "--json", env=env).stdout)
        assert status["state"] == "running"
        assert status["sessions"] == 0
        assert [entry["core"] for entry in status["reactors"]] == [0]
        assert status["controllers"][0]["bdev"] == "M0"
        assert status["controllers"][0]["socket"] == f"{folder}/drivebay/vhost.0"
        assert Path(status["log_file"]).exists()
        shown = drivebay("target", "status", env=env)
        assert f"process {status['pid']}" in shown.stdout
        assert "vhost.0" in shown.stdout
        stopped = drivebay("target", "stop", "--json", env=env)
        assert json.loads(stopped.stdout) == {"stopped": status["pid"]}
        assert not _runs(status["pid"])
        assert drivebay("target", "status", "-s", rpc_socket, env=env).returncode == 3
        assert not Path(rpc_socket).exists()


def test_a_background_target_keeps_what_it_has(folder: Path) -> None:
    with background(folder) as env:
        start = ("target", "start", "-r", f"{folder}/r")
        started = drivebay(*start, env=env)
        assert f"{folder}/data/drivebay/target.json, kept after every change" in started.stdout
        made = drivebay("disk", "create", "d", "--file", f"{folder}/d", "--size", "8M", env=env)
        assert made.returncode == 0, made.stderr
        assert drivebay("target", "stop", env=env).returncode == 0
        again = drivebay(*start, env=env)
        assert again.returncode == 0, again.stderr
        assert drivebay("disk", "list", "-q", env=env).stdout == "d\n"
        assert drivebay("target", "stop", env=env).returncode == 0
        # A configuration of one's own is read, and not written.
        config = folder / "own.json"
        config.write_text(configuration(MALLOC))
        own = drivebay(*start, "-c", str(config), env=env)
        assert f"{config}, read once" in own.stdout
        assert drivebay("disk", "list", "-q", env=env).stdout == "M0\n"


def _runs(pid: int) -> bool:
    """Whether a process that is not our child is more than an exit code to be collected."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def test_a_target_in_use_is_stopped_only_by_force(folder: Path) -> None:
    with background(folder) as env:
        started = drivebay("target", "start", "-r", f"{folder}/r", "-S", str(folder), env=env)
        assert started.returncode == 0, started.stderr
        drivebay("rpc", "bdev_malloc_create", json.dumps(MALLOC["params"]), env=env)
        drivebay("rpc", "vhost_create_blk_controller", json.dumps(CONTROLLER["params"]), env=env)
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(folder / "vhost.0"))
            _wait_for_session(env)
            refused = drivebay("target", "stop", env=env)
            assert refused.returncode == 1
            assert "virtual machines have sessions on vhost.0 (1)" in refused.stderr
            forced = drivebay("target", "stop", "--force", env=env)
            assert forced.returncode == 0, forced.stderr
            assert monitor.recv(1) == b""


def _wait_for_session(env: dict[str, str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        shown = json.loads(drivebay("rpc", "vhost_get_controllers", env=env).stdout)
        if shown[0]["sessions"]:
            return
    raise AssertionError("the session was never shown")


def test_a_background_start_that_fails_says_what_the_target_said(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration({"method": "bdev_nosuch_create"}))
    with background(folder) as env:
        failed = drivebay("target", "start", "-r", f"{folder}/r", "-c", str(config), env=env)
        assert failed.returncode == 1
        assert "bdev_nosuch_create" in failed.stderr
        assert names(folder) == {"c.json", "drivebay"}, "no data folder: the file was named"
        assert drivebay("target", "stop", "-s", f"{folder}/r", env=env).returncode == 3


def test_what_is_no_drivebay_target_is_not_stopped(folder: Path) -> None:
    """A stand-in for another program's target: it answers as SPDK does, and must live on."""
    answer = {"jsonrpc": "2.0", "id": 1, "result": {"version": "SPDK v26.09", "fields": {}}}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "r"))
        listening.listen()

        def serve() -> None:
            connection, _address = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(json.dumps(answer).encode() + b"\n")

        server = threading.Thread(target=serve)
        server.start()
        done = drivebay("target", "stop", "--force", "-s", str(folder / "r"))
        server.join()
    assert done.returncode == 2
    assert "'SPDK v26.09' and not a Drivebay target" in done.stderr
