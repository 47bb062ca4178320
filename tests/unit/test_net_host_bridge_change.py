"""What commands, logins and the guardian know of each other, and what each may do then."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drivebay.cli import net_host_bridge
from drivebay.cli.main import main
from drivebay.errors import InUse, NotFound, StateError
from drivebay.net.hostbridge import clients, confirmation, managers, return_trip
from drivebay.net.hostbridge.change import MOVED, MOVING, Change
from drivebay.net.hostbridge.clients import Client
from drivebay.net.hostbridge.confirmation import confirm
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.return_trip import take_back
from drivebay.net.hostbridge.state import Before, LinkState, boot_seconds
from drivebay.system.processes import boot_id

UPLINK = LinkState("eno1", 2, "52:54:00:12:34:56", 1500, True)


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """A folder of the test; no network and no manager of this machine is touched."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(confirmation, "ROOT", tmp_path / "root")

    def never(*words: object, **more: object) -> None:
        raise AssertionError("the devices of this machine are touched")

    monkeypatch.setattr(return_trip, "put_back", never)
    monkeypatch.setattr(managers, "_run", never)
    found = Change()
    found.prepare()
    return found


def before() -> Before:
    return Before("br0", UPLINK, [], [], [], boot_id(), boot_seconds())


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_change_is_broken_off_when_its_command_has_ended(change: Change) -> None:
    change.begin(before())
    assert change.waits()
    assert not change.broken_off(), "this process is at it"
    change.note(pid=ended_process())
    assert change.broken_off()
    change.note(phase=MOVED)
    assert not change.broken_off(), "it had done its work"


def test_another_process_with_the_commands_number_is_not_the_command(change: Change) -> None:
    change.begin(before())
    change.note(ticks=1)
    assert change.broken_off()
    change.end_mover()  # would end this very process


def test_a_guardian_is_known_by_pid_and_start(change: Change) -> None:
    assert change.guarded() is None
    change.guard(30)
    assert 25 < (change.guarded() or 0) <= 30
    path = change.folder / "guardian.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ticks": 1}))
    assert change.guarded() is None
    path.write_text("{")
    assert change.guarded() is None


def test_the_seconds_count_from_the_end_of_the_moves(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("drivebay.net.hostbridge.change.boot_seconds", lambda: now)
    change.begin(before())
    change.guard(30)
    now += 40
    assert change.guarded() == 30
    change.note_moved()
    now += 20
    assert change.guarded() == 10
    now += 20
    assert change.guarded() == 0
    change.begin(before())
    assert change.guarded() == 30


def test_after_a_boot_nothing_is_restored_because_all_is(change: Change) -> None:
    change.begin(dataclasses.replace(before(), boot="another"))
    take_back(change, "undo")
    assert not change.waits()
    change.begin(dataclasses.replace(before(), boot="another"))
    change.note(phase=MOVED)
    with pytest.raises(StateError, match="has started anew"):
        confirm(change, change.before())
    assert not change.waits()


def test_half_of_a_change_is_not_confirmed(change: Change) -> None:
    change.begin(before())
    assert change.phase() == MOVING
    with pytest.raises(StateError, match="broken off in the middle"):
        confirm(change, change.before())
    assert change.waits()


def test_confirmed_it_is_kept_for_undo(change: Change) -> None:
    change.begin(before())
    change.note(phase=MOVED)
    done = confirm(change, change.before())
    assert (done.manager, done.files) == ("", [])
    assert not change.waits()
    assert change.confirmed("eno1").uplink == UPLINK
    with pytest.raises(NotFound):
        change.confirmed("eth7")


def test_if_netplan_does_not_take_it_the_files_are_as_before(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = confirmation.ROOT / "etc/netplan/01.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("network:\n  ethernets:\n    eno1: {dhcp4: true}\n")
    asked: list[str] = []

    def refuse(*command: str) -> None:
        asked.append(path.read_text())
        if len(asked) == 1:
            raise StateError("netplan does not want it")

    monkeypatch.setattr(managers, "_run", refuse)
    state = dataclasses.replace(before(), manager=Manager(managers.NETPLAN).to_json())
    change.begin(state)
    change.note(phase=MOVED)
    with pytest.raises(StateError, match="does not want it"):
        confirm(change, state)
    assert "bridges" in asked[0]
    assert "bridges" not in asked[1], "netplan sees the old files again"
    assert (change.waits(), change.phase()) == (True, MOVED), "confirm or undo may come again"


def test_a_change_that_waits_keeps_others_from_beginning(
    change: Change, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    change.begin(before())
    change.note(phase=MOVED)
    change.guard(30)
    assert main(["net", "host-bridge", "plan", "eno2"]) == 1
    assert "a change of 'eno1' waits for confirmation" in capsys.readouterr().err
    with pytest.raises(InUse):
        net_host_bridge._nothing_waits(change)


def test_only_root_and_only_sensible_times(
    change: Change, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["net", "host-bridge", "plan", "eno1"]) == 1
    assert "only root" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["net", "host-bridge", "apply", "eno1", "--seconds", "5"]) == 2
    assert "10 to 600" in capsys.readouterr().err


# ---- DHCP clients -------------------------------------------------------------------------------


def test_a_client_goes_on_with_its_own_words() -> None:
    client = Client("dhclient", 7, "/sbin/dhclient", ["dhclient", "-lf", "/x/eno1.leases", "eno1"])
    assert client.on("eno1", "br0").words == ["dhclient", "-lf", "/x/eno1.leases", "br0"]
    client = Client("udhcpc", 7, "/bin/busybox", ["udhcpc", "-ieno1", "-x", "hostname:eno1"])
    assert client.on("eno1", "br0").words == ["udhcpc", "-ibr0", "-x", "hostname:eno1"]
    assert client.serves("eno1")
    assert not client.serves("eno10")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["udhcpc", "-i", "eno1"], "udhcpc"),
        (["/sbin/dhclient", "-v", "eno1"], "dhclient"),
        (["busybox", "udhcpc", "-i", "eno1"], "udhcpc"),
        (["vim", "eno1"], None),
    ],
)
def test_a_client_is_known_by_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: str | None
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (tmp_path / "7/exe").symlink_to("/bin/busybox")
    monkeypatch.setattr(clients, "start_ticks", lambda pid: 1)
    found = clients.read_client(tmp_path / "7")
    assert (found.kind if found else None) == kind
    assert found is None or (found.pid, found.words) == (7, words)


@pytest.mark.parametrize(
    ("title", "serves"),
    [
        ("dhcpcd: [manager] [ip4] [ip6]", True),
        ("dhcpcd: eno1 [ip4]", True),
        ("/sbin/dhcpcd\0eno1", True),
        ("dhcpcd: wlan0 [ip4]", False),
    ],
)
def test_dhcpcd_is_known_by_its_title(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, serves: bool
) -> None:
    (tmp_path / "comm").write_text("dhcpcd\n")
    (tmp_path / "cmdline").write_text(title)
    monkeypatch.setattr(clients, "_processes", lambda: [tmp_path])
    assert clients.dhcpcd_serves("eno1", {"lo", "eno1", "wlan0"}) is serves
