"""The target as a real process: its start, its refusals, its end, and its configuration.

Everything goes through what a user has: the command line, signals, files and the
RPC socket. Whatever a process does, its folder must be as before when it has ended.
"""

from __future__ import annotations

import grp
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.command_line import (
    CONTROLLER,
    DRIVEBAY,
    MALLOC,
    WAIT_S,
    configuration,
    drivebay,
    names,
    vhost,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets; pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(folder: Path, number: signal.Signals) -> None:
    with vhost(folder, "-f", str(folder / "pid")) as target:
        target.wait_for_rpc()
        assert (folder / "pid").read_text() == f"{target.process.pid}\n"
        target.call("bdev_malloc_create", **MALLOC["params"])
        target.call("vhost_create_blk_controller", **CONTROLLER["params"])
        assert names(folder) >= {"pid", "rpc.sock", "vhost.0"}
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(folder / "vhost.0"))
            assert target.end(number) == 0
            assert monitor.recv(1) == b""
        assert "Traceback" not in target.errors()
    assert names(folder) == set()


def test_kill_instance_is_a_signal(folder: Path) -> None:
    with vhost(folder) as target:
        target.wait_for_rpc()
        assert target.call("spdk_kill_instance", sig_name="SIGTERM") is True
        assert target.process.wait(WAIT_S) == 0
    assert names(folder) == set()


def test_a_closed_terminal_does_not_end_it(folder: Path) -> None:
    with vhost(folder) as target:
        target.wait_for_rpc()
        target.process.send_signal(signal.SIGHUP)
        target.process.send_signal(signal.SIGUSR1)
        assert target.call("spdk_get_version")["fields"]["major"] >= 26
        assert target.end() == 0


@pytest.mark.parametrize("delay_ms", [0, 40, 80, 120, 160, 200, 250, 300])
def test_a_signal_during_the_start_leaves_nothing(folder: Path, delay_ms: int) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    with vhost(folder, "-c", str(config), "-f", str(folder / "pid")) as target:
        time.sleep(delay_ms / 1000)
        # Before Python has installed its handlers it is the kernel that ends the process.
        assert target.end() in (0, -signal.SIGTERM)
        assert "Traceback" not in target.errors()
    assert names(folder) == {"c.json"}


def test_a_killed_one_is_no_obstacle_for_the_next(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    options = ("-c", str(config), "-f", str(folder / "pid"))
    with vhost(folder, *options) as first:
        first.wait_for_rpc().end(signal.SIGKILL)
    assert "vhost.0" in names(folder)
    with vhost(folder, *options) as second:
        second.wait_for_rpc()
        assert second.call("vhost_get_controllers")[0]["ctrlr"] == "vhost.0"
        assert second.end() == 0
    assert names(folder) == {"c.json"}


BAD_START = [
    (["-S", "{folder}/none"], "the folder '{folder}/none' for controllers' sockets does not exist"),
    (["-S", "{folder}/file"], "'{folder}/file' is not a folder"),
    (["-m", "zz"], "cpumask 'zz' is neither"),
    (["-m", "0x0"], "cpumask '0x0' names no possible core"),
    (["-m", "[900]"], "names core 900, which is not among the cores"),
    (["-p", "4000"], "main core 4000 is not among the cores"),
    (["-r", "{folder}/" + "r" * 120], "a socket address holds at most 107"),
    (["-r", "{folder}/file"], "'{folder}/file' exists and is not a socket"),
    (["-r", "localhost:5260"], "RPC over TCP is not offered"),
    (["-f", "{folder}/none/pid"], "'{folder}/none' for the pid file does not exist"),
    (["-f", "{folder}"], "the pid file '{folder}'"),
    (["-c", "{folder}/none.json"], "'{folder}/none.json' does not exist"),
    (["-c", "{folder}/file"], "{folder}/file"),
    (["-c", "{folder}/shape.json"], "{folder}/shape.json"),
    (["-c", "{folder}/unknown.json"], "bdev_nosuch_create"),
    (["-c", "{folder}/failing.json"], "bdev_aio_create"),
    (["-c", "{folder}"], "{folder}"),
    (["--autosave"], "--autosave has no file to write"),
    (["-L", "nosuch"], "no log flag 'nosuch'"),
    (["--socket-group", "no such"], "no group is called 'no such'"),
]


@pytest.mark.parametrize(("options", "said"), BAD_START, ids=lambda value: str(value)[:40])
def test_a_refusal_is_a_sentence_and_leaves_nothing(
    folder: Path, options: list[str], said: str
) -> None:
    (folder / "file").write_text("{ not JSON")
    (folder / "shape.json").write_text("[1, 2]")
    (folder / "unknown.json").write_text(
        configuration(MALLOC, CONTROLLER, {"method": "bdev_nosuch_create"})
    )
    missing = {"name": "A0", "filename": f"{folder}/no-image", "block_size": 512}
    (folder / "failing.json").write_text(
        configuration(MALLOC, CONTROLLER, {"method": "bdev_aio_create", "params": missing})
    )
    before = names(folder)
    with vhost(
        folder, "-f", f"{folder}/pid", *(word.format(folder=folder) for word in options)
    ) as (target):
        assert target.process.wait(WAIT_S) == 1
        printed = target.errors()
    errors = [line for line in printed.splitlines() if line.startswith("drivebay: error: ")]
    assert len(errors) == 1, printed
    assert said.format(folder=folder) in errors[0]
    assert "Traceback" not in printed
    assert names(folder) == before


def test_a_busy_rpc_socket_is_refused_and_its_owner_lives_on(folder: Path) -> None:
    with vhost(folder) as first:
        first.wait_for_rpc()
        with vhost(folder, "-f", f"{folder}/pid") as second:
            assert second.process.wait(WAIT_S) == 1
            printed = second.errors()
        assert f"drivebay: error: the RPC socket '{folder}/rpc.sock'" in printed
        assert str(first.process.pid) in printed
        assert "hint: " in printed
        assert first.call("spdk_get_version")
        assert first.end() == 0
    assert names(folder) == set()


def test_init_errors_can_be_ignored(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration({"method": "bdev_nosuch_create"}, MALLOC))
    with vhost(folder, "-c", str(config), "--json-ignore-init-errors") as target:
        target.wait_for_rpc()
        assert [bdev["name"] for bdev in target.call("bdev_get_bdevs")] == ["M0"]
        assert target.end() == 0
        assert "bdev_nosuch_create" in target.errors()


def test_a_saved_configuration_brings_the_same_target_back(folder: Path) -> None:
    config = folder / "vhost.json"
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    with vhost(folder) as target:
        target.wait_for_rpc()
        target.call("bdev_malloc_create", **MALLOC["params"])
        target.call("bdev_null_create", name="N0", block_size=4096, num_blocks=1024)
        target.call("bdev_aio_create", name="A0", filename=f"{folder}/disk.img", block_size=512)
        target.call("vhost_create_blk_controller", **CONTROLLER["params"])
        target.call("vhost_create_blk_controller", ctrlr="vhost.1", dev_name="A0", readonly=True)
        with config.open("w") as output:
            saved = subprocess.run(
                [*DRIVEBAY, "rpc", "-s", str(target.rpc_socket), "save_config"],
                stdout=output,
                timeout=WAIT_S,
            )
        assert saved.returncode == 0
        bdevs = target.call("bdev_get_bdevs")
        controllers = target.call("vhost_get_controllers")
        assert target.end() == 0
    with vhost(folder, "-m", "0x1", "-s", "1024", "-c", str(config)) as again:
        again.wait_for_rpc()
        assert again.call("bdev_get_bdevs") == bdevs
        assert again.call("vhost_get_controllers") == controllers
        assert json.loads(again.rpc("save_config").stdout) == json.loads(config.read_text())
        assert again.end() == 0


def test_a_configuration_can_be_loaded_into_a_running_target(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    with vhost(folder) as target:
        target.wait_for_rpc()
        assert target.rpc("load_config", str(config)).returncode == 0
        assert target.call("vhost_get_controllers")[0]["ctrlr"] == "vhost.0"
        twice = target.rpc("load_config", input=config.read_text())
        assert twice.returncode == 1
        assert "entry 1 of 'bdev' of the configuration failed: bdev_malloc_create" in twice.stderr
        assert target.end() == 0


def test_a_configuration_starts_a_target_that_waits(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    with vhost(folder, "--wait-for-rpc") as target:
        target.wait_for_rpc()
        early = target.rpc("bdev_get_bdevs")
        assert early.returncode == 1
        assert "(code -1)" in early.stderr
        assert target.rpc("load_config", str(config)).returncode == 0
        assert target.call("framework_wait_init") is True
        assert target.call("vhost_get_controllers")[0]["ctrlr"] == "vhost.0"
        assert target.end() == 0


def test_waiting_with_a_configuration_file_loads_it_after_the_start(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    with vhost(folder, "--wait-for-rpc", "-c", str(config)) as target:
        target.wait_for_rpc()
        assert target.call("framework_start_init") is True
        assert [bdev["name"] for bdev in target.call("bdev_get_bdevs")] == ["M0"]
        assert target.end() == 0


def test_autosave_keeps_every_change_over_a_restart(folder: Path) -> None:
    config = folder / "auto.json"
    options = ("-c", str(config), "--autosave")
    with vhost(folder, *options) as target:
        target.wait_for_rpc()
        target.call("bdev_malloc_create", **MALLOC["params"])
        target.call("vhost_create_blk_controller", **CONTROLLER["params"])
        target.end(signal.SIGKILL)
    with vhost(folder, *options) as again:
        again.wait_for_rpc()
        assert again.call("vhost_get_controllers")[0]["ctrlr"] == "vhost.0"
        again.call("vhost_delete_controller", ctrlr="vhost.0")
        again.call("bdev_malloc_delete", name="M0")
        assert again.end() == 0
    with vhost(folder, *options) as last:
        last.wait_for_rpc()
        assert last.call("bdev_get_bdevs") == []
        assert last.end() == 0
    assert names(folder) == {"auto.json"}


def test_only_allowed_methods_are_there(folder: Path) -> None:
    with vhost(folder, "--rpcs-allowed", "spdk_get_version,rpc_get_methods") as target:
        target.wait_for_rpc()
        assert target.call("rpc_get_methods") == ["spdk_get_version", "rpc_get_methods"]
        refused = target.rpc("bdev_get_bdevs")
        assert refused.returncode == 1
        assert "bdev_get_bdevs: Method not found (code -32601)" in refused.stderr
        assert target.end() == 0


def test_without_rpc_server_there_is_no_socket(folder: Path) -> None:
    config = folder / "c.json"
    config.write_text(configuration(MALLOC, CONTROLLER))
    with vhost(folder, "--no-rpc-server", "-c", str(config)) as target:
        deadline = time.monotonic() + WAIT_S
        while "vhost.0" not in names(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert names(folder) == {"c.json", "vhost.0"}
        assert target.end() == 0
    assert names(folder) == {"c.json"}


def test_the_descriptor_limit_is_raised(folder: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    with vhost(folder, preexec_fn=lower) as target:
        target.wait_for_rpc()
        limits = Path(f"/proc/{target.process.pid}/limits").read_text()
        line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        soft = line.split()[3]
        assert soft == line.split()[4]
        assert target.end() == 0


def test_permissions_of_sockets(folder: Path) -> None:
    options = ("--socket-mode", "0660", "--socket-group", grp.getgrgid(os.getegid()).gr_name)
    with vhost(folder, *options) as target:
        target.wait_for_rpc()
        target.call("bdev_malloc_create", **MALLOC["params"])
        target.call("vhost_create_blk_controller", **CONTROLLER["params"])
        assert stat.S_IMODE((folder / "vhost.0").stat().st_mode) == 0o660
        assert (folder / "vhost.0").stat().st_gid == os.getegid()
        assert stat.S_IMODE(target.rpc_socket.stat().st_mode) == 0o600
        assert target.end() == 0


def test_an_rpc_error_has_its_code_its_reason_and_exit_code_1(folder: Path) -> None:
    with vhost(folder) as target:
        target.wait_for_rpc()
        refused = target.rpc("bdev_malloc_delete", '{"name": "nosuch"}')
        assert (refused.returncode, refused.stdout) == (1, "")
        first = refused.stderr.splitlines()[0]
        assert first.startswith("drivebay: error: bdev_malloc_delete: No such device (code -19)")
        assert "nosuch" in first
        for text in ("{name: nosuch}", "7"):
            malformed = target.rpc("bdev_malloc_delete", text)
            assert malformed.returncode == 2
            assert "hint: " in malformed.stderr
        assert target.end() == 0


def test_an_unreachable_target_is_exit_code_3(folder: Path) -> None:
    path = folder / "rpc.sock"
    absent = drivebay("rpc", "-s", str(path), "spdk_get_version")
    assert absent.returncode == 3
    assert f"can't reach a target at '{path}'" in absent.stderr
    assert "No such file" in absent.stderr
    assert "hint: start one with 'drivebay target start'" in absent.stderr
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    path.chmod(0o640)
    dead = drivebay("target", "status", "-s", str(path))
    assert dead.returncode == 3
    assert f"'{path}' (owner " in dead.stderr
    assert "mode 0640; nobody listens there" in dead.stderr
    path.unlink()
    path.touch()
    plain = drivebay("target", "stop", "-s", str(path))
    assert plain.returncode == 3
    assert "not a socket" in plain.stderr
