"""What a host does by itself: `vm autostart`, the systemd unit, `start --autostart`, `stop --all`.

systemd's own checks read the unit; tests/e2e/test_vm_debian.py lets a systemd start it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.cli.main import main
from drivebay.errors import StateError
from drivebay.vm import lifecycle, renewal, several, unit
from drivebay.vm.kvm import Accelerator
from drivebay.vm.run import load_running
from drivebay.vm.unit import unit_path, unit_text
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process

# systemd's own count, from 0 to 10; what a root's service with disks and networks may not lack.
EXPOSURE_MOST = 5.3

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Run:
    def words(*more: str) -> tuple[int, str, str]:
        code = main(["vm", *more, "-s", world.socket])
        return code, *capsys.readouterr()

    return words


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def systemd(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that notes what it is asked, and fails at the word in the file 'fails'."""
    (tmp_path / "systemctl").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'grep -qx "$1" {tmp_path}/fails 2>/dev/null && echo "Access denied" >&2 && exit 1\n'
        "exit 0\n"
    )
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(unit, "_SYSTEM_UNITS", tmp_path / "units")
    monkeypatch.setattr(unit, "_RUNS_HERE", tmp_path)
    monkeypatch.setattr(unit, "_is_system", lambda: True)
    return tmp_path


# ---- marking ------------------------------------------------------------------------------------


def test_a_mark_is_set_shown_and_taken_away(run: Run, world: World, systemd: Path) -> None:
    world.vm("web")
    code, said, _ = run("autostart", "web")
    assert (code, said.splitlines()) == (0, [
        "VM 'web' starts with the host",
        "  once this host has the unit for it: drivebay vm autostart --install",
    ])  # fmt: skip
    assert world.vms.load("web").spec.autostart
    assert "autostart  with the host\n" in run("info", "web")[1]
    assert json.loads(run("list", "--json")[1])[0]["autostart"] is True
    assert re.search(r"autostart\nweb .* yes\n", run("list")[1])
    assert run("autostart", "web", "--off", "--dry-run")[1] == (
        "would have VM 'web' start no longer with the host\n"
    )
    assert run("autostart", "web", "--off")[1] == "VM 'web' does not start with the host\n"
    assert not world.vms.load("web").spec.autostart
    assert run("autostart", "web", "--off")[0] == 0, "twice is as good as once"
    assert "autostart  no\n" in run("info", "web")[1]


def test_a_mark_needs_no_restart(
    run: Run, world: World, systemd: Path, process: subprocess.Popen[bytes]
) -> None:
    seem_to_run(world.vm("web"), process)
    run("autostart", "web")
    assert "waits for a restart" not in run("info", "web")[1]


def test_a_clone_without_its_own_identity_is_not_marked(run: Run, world: World) -> None:
    renewal.mark(world.vm("copy").folder)
    code, _, said = run("autostart", "copy")
    assert (code, "identity of its original" in said, "drivebay vm start copy" in said) == (
        1, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("words", [(), ("--off",), ("web", "--install"), ("--install", "--off")])
def test_words_that_make_no_sense(run: Run, systemd: Path, words: tuple[str, ...]) -> None:
    assert run("autostart", *words)[0] == 2
    assert not (systemd / "asked").exists()


# ---- the unit -----------------------------------------------------------------------------------


@pytest.fixture
def verified(tmp_path: Path) -> Callable[[str], None]:
    def verify(*options: str) -> None:
        file = tmp_path / unit.NAME
        file.write_text(unit_text())
        done = subprocess.run(
            ["systemd-analyze", *options, "verify", "--man=no", file],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    return verify


def test_systemd_finds_no_fault_in_roots_unit(
    systemd: Path, verified: Callable[..., None], tmp_path: Path
) -> None:
    verified()
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", tmp_path / unit.NAME],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = re.search(r"exposure level for drivebay.service: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    assert float(found[1]) <= EXPOSURE_MOST


def test_systemd_finds_no_fault_in_a_users_unit(
    systemd: Path, verified: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "_is_system", lambda: False)
    verified("--user")
    assert "WantedBy=default.target" in unit_text()
    assert "CapabilityBoundingSet" not in unit_text(), "a user's systemd could not do it"
    assert unit_path() == systemd / "config/systemd/user/drivebay.service"


def test_the_unit_calls_this_drivebay_and_knows_where_its_vms_are(
    systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", '/opt/my "py" 100%/$x')
    monkeypatch.setenv("XDG_DATA_HOME", "/big disk/100%")
    monkeypatch.delenv("DRIVEBAY_QEMU", raising=False)
    text = unit_text()
    assert 'ExecStart="/opt/my \\"py\\" 100%%/$$x" -P -m drivebay target start ' in text
    assert 'Environment="XDG_DATA_HOME=/big disk/100%%"\n' in text
    assert "DRIVEBAY_QEMU" not in text
    assert "@" not in re.sub("@[a-z]", "", text.replace('"$$@"', ""))


def test_installing_writes_it_and_has_systemd_read_it(run: Run, systemd: Path) -> None:
    code, said, _ = run("autostart", "--install", "--dry-run")
    assert (code, said.count("would")) == (0, 3)
    assert not unit_path().exists()
    code, said, _ = run("autostart", "--install")
    assert (code, "systemctl start drivebay.service" in said) == (0, True)
    assert unit_path().read_text() == run("autostart", "--unit")[1]
    assert (systemd / "asked").read_text() == "daemon-reload\nenable drivebay.service\n"
    unit_path().write_text(unit_path().read_text() + "# of an earlier version\n")
    assert run("autostart", "--install")[0] == 0
    assert unit_path().read_text() == unit_text()
    assert "is there already" in run("autostart", "--install", "--dry-run")[1]


def test_what_systemd_refuses_leaves_what_was_there(run: Run, systemd: Path) -> None:
    (systemd / "fails").write_text("enable\n")
    code, _, said = run("autostart", "--install")
    assert (code, "'systemctl enable drivebay.service' failed: Access denied" in said) == (1, True)
    assert not unit_path().exists()
    older = unit_text() + "# of an earlier version\n"
    unit_path().write_text(older)
    assert run("autostart", "--install")[0] == 1
    assert unit_path().read_text() == older


def test_a_unit_that_is_somebody_elses_stays(run: Run, systemd: Path) -> None:
    unit_path().parent.mkdir()
    unit_path().write_text("[Unit]\n")
    code, _, said = run("autostart", "--install")
    assert (code, "that drivebay has not made" in said) == (1, True)
    assert unit_path().read_text() == "[Unit]\n"


def test_a_host_without_systemd(run: Run, systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no systemctl" in run("autostart", "--install")[2]
    monkeypatch.setattr(unit, "_RUNS_HERE", systemd / "gone")
    assert "was not started by systemd" in run("autostart", "--install")[2]
    shutil.rmtree(unit_path().parent, ignore_errors=True)
    monkeypatch.setattr(unit, "_SYSTEM_UNITS", Path("/proc/nowhere"))
    monkeypatch.setattr(unit, "_RUNS_HERE", systemd)
    assert "can't write '/proc/nowhere" in run("autostart", "--install")[2]


# ---- what the unit runs -------------------------------------------------------------------------


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of VMs that were started; one that is called 'bad' does not start."""
    names: list[str] = []

    def start(vms: object, name: str, socket: str | None) -> None:
        if name == "bad":
            raise StateError("QEMU did not start it", hint="its log: /x")
        names.append(name)

    monkeypatch.setattr(lifecycle, "start", start)
    monkeypatch.setattr(several, "choose_accelerator", lambda: Accelerator("tcg", ""))
    monkeypatch.setattr(several, "find_qemu", lambda named: None)
    return names


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """What systemd is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0drivebay-test-{os.getpid()}")
        channel.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@drivebay-test-{os.getpid()}")
        yield lambda: channel.recv(65536).decode()


def test_those_that_are_marked_and_off_are_started(
    run: Run, world: World, starts: list[str], process: subprocess.Popen[bytes],
    notified: Callable[[], str],
) -> None:  # fmt: skip
    world.vm("plain")
    world.vm("web", autostart=True)
    seem_to_run(world.vm("runs", autostart=True), process)
    assert run("start", "--autostart")[:2] == (0, "VM 'web' runs\n")
    assert starts == ["web"]
    assert notified() == "STATUS=1 VMs were started with the host"
    world.vms.delete(world.vms.load("web"))
    assert run("start", "--autostart")[:2] == (
        0, "no VM that is to start with the host is off\n",
    )  # fmt: skip


def test_one_that_does_not_start_hurts_no_other_and_is_told(
    run: Run, world: World, starts: list[str], notified: Callable[[], str]
) -> None:
    for name in ("bad", "broken", "web"):
        world.vm(name, autostart=True)
    (world.vms.folder / "broken/vm.toml").write_text("autostart = ")
    code, said, errors = run("start", "--autostart")
    assert (code, said, starts) == (1, "VM 'web' runs\n", ["web"])
    assert "error: VM 'bad': QEMU did not start it\nhint: its log: /x\n" in errors
    assert "vm.toml of 'broken' is not TOML" in errors
    status = notified()
    assert status.startswith("STATUS=DEGRADED: 2 of the VMs that start with the host do not run")
    assert "VM 'bad': QEMU did not start it" in status
    assert "\n" not in status
    shown: Any = json.loads(run("start", "--autostart", "--json")[1])
    assert {entry["name"]: entry["error"] for entry in shown} == {
        "bad": "QEMU did not start it", "web": None,
    }  # fmt: skip


def test_a_systemd_that_is_gone_stops_nobody(
    run: Run, world: World, starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    world.vm("web", autostart=True)
    code, _, said = run("start", "--autostart")
    assert (code, "takes no status" in said) == (0, True)


def test_all_that_run_are_stopped(run: Run, world: World, process: subprocess.Popen[bytes]) -> None:
    assert run("stop", "--all")[:2] == (0, "no VM runs\n")
    world.vm("off")
    for name in ("a", "b"):
        seem_to_run(world.vm(name), process)
    code, said, _ = run("stop", "--all", "--force")
    assert code == 0
    assert sorted(said.splitlines())[0].startswith("VM 'a' ")
    assert "'off'" not in said
    assert process.wait(20) == -15


def test_one_whose_file_was_broken_since_is_stopped_all_the_same(
    run: Run, world: World, process: subprocess.Popen[bytes]
) -> None:
    vm = world.vm("web")
    seem_to_run(vm, process)
    (vm.folder / "vm.toml").write_text("memory = ")
    assert load_running(world.vms, "web").spec == vm.spec
    code, said, _ = run("stop", "--all", "--force")
    assert (code, said[:9], process.wait(20)) == (0, "VM 'web' ", -15)
    code, _, said = run("stop", "web")
    assert (code, "is not TOML" in said) == (2, True)


def test_one_that_cannot_be_stopped_is_told(
    run: Run, world: World, process: subprocess.Popen[bytes]
) -> None:
    seem_to_run(world.vm("web"), process)
    with world.vms.locked("web"):
        code, _, said = run("stop", "--all")
        shown = json.loads(run("stop", "--all", "--json")[1])
    assert (code, "error: VM 'web': another command" in said) == (1, True)
    assert shown[0]["ended"] is None
    assert "another command" in shown[0]["error"]


@pytest.mark.parametrize(
    "words",
    [("start",), ("stop",), ("start", "web", "--autostart"), ("stop", "web", "--all"),
     ("start", "--autostart", "--wait")],
)  # fmt: skip
def test_one_or_several(run: Run, starts: list[str], words: tuple[str, ...]) -> None:
    assert run(*words)[0] == 2
    assert starts == []
