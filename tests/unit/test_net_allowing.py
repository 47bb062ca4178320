"""net/allowing.py: who may join a network, in files of a test; net/bridge_helper.py: refusals."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import stat
import subprocess
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, NotFound, StateError, UsageError
from drivebay.net import allowing, bridge_helper
from drivebay.net.bridge_helper import explained
from drivebay.net.model import Network
from drivebay.net.store import Networks

pytestmark = pytest.mark.needs_root

FOREIGN = b"# ours since 2019\n\tallow  virbr0 \ninclude /etc/qemu/site.conf\r\n\xff no newline"
SUBNET = IPv4Network("192.168.9.0/24")
LAN = Network("lan", "nat", "db-lan", SUBNET, allow_users=("games",))
DMZ = Network("dmz", "nat", "db-dmz", SUBNET, allow_users=("games", "daemon"))


@dataclass(frozen=True)
class Host:
    """QEMU's helper and its settings, as a host has them; and the networks."""

    helper: Path
    etc: Path
    networks: Networks

    @property
    def conf(self) -> Path:
        return self.etc / "bridge.conf"

    def make(self, network: Network) -> Network:
        self.networks.create(network)
        allowing.check(network)
        allowing.allow(self.networks, network)
        return network

    def delete(self, network: Network) -> None:
        allowing.disallow(self.networks, network)
        self.networks.delete(network.name)

    def mode(self) -> int:
        return stat.S_IMODE(self.helper.stat().st_mode)

    def readers(self, path: Path) -> list[str]:
        """Of some users, those who can read a file."""
        return [user for user in ("games", "daemon", "nobody") if allowing._can(user, "-r", path)]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # plain users look into it
    helper, etc = tmp_path / "qemu-bridge-helper", tmp_path / "qemu"
    helper.write_bytes(b"")
    helper.chmod(0o755)
    monkeypatch.setattr(bridge_helper, "PLACES", (helper,))
    for module in (allowing, bridge_helper):
        monkeypatch.setattr(module, "settings_of", lambda _: etc)
    # What dpkg does is tried in tests/e2e/test_net_plain_user.py, with a database of its own.
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return Host(helper, etc, Networks(tmp_path / "networks"))


def test_a_network_lets_its_user_and_leaves_nothing(host: Host) -> None:
    host.make(LAN)
    mine = host.etc / "drivebay-games.conf"
    assert mine.read_text().splitlines()[1:] == ["allow db-lan"]
    assert host.readers(mine) == ["games"]
    assert host.readers(host.conf) == ["games", "daemon", "nobody"]
    assert f"include {mine}" in host.conf.read_text().splitlines()
    assert host.mode() == 0o4755
    assert allowing.missing(host.networks, LAN) == []
    host.delete(LAN)
    assert not host.etc.exists()
    assert host.mode() == 0o755
    allowing.disallow(host.networks, LAN)  # harmless twice


def test_foreign_lines_stay_byte_for_byte(host: Host) -> None:
    host.etc.mkdir()
    host.conf.write_bytes(FOREIGN)
    host.conf.chmod(0o664)
    os.chown(host.conf, 0, pwd.getpwnam("games").pw_gid)
    host.make(LAN)
    host.make(DMZ)
    assert host.conf.read_bytes().endswith(FOREIGN)
    status = host.conf.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o664, pwd.getpwnam("games").pw_gid)
    host.delete(LAN)
    host.delete(DMZ)
    assert host.conf.read_bytes() == FOREIGN
    assert [path.name for path in host.etc.iterdir()] == ["bridge.conf"]
    assert host.mode() == 0o4755, "whoever wrote these lines uses the helper, too"


def test_a_folder_that_was_there_stays(host: Host) -> None:
    host.etc.mkdir()
    host.make(LAN)
    host.delete(LAN)
    assert list(host.etc.iterdir()) == []


def test_a_bridge_conf_that_is_a_link_stays_one(host: Host, tmp_path: Path) -> None:
    host.etc.mkdir()
    (tmp_path / "elsewhere").write_bytes(FOREIGN)
    host.conf.symlink_to(tmp_path / "elsewhere")
    host.make(LAN)
    assert host.conf.is_symlink()
    assert b"drivebay-games" in (tmp_path / "elsewhere").read_bytes()
    host.delete(LAN)
    assert (tmp_path / "elsewhere").read_bytes() == FOREIGN


def test_users_of_two_networks(host: Host) -> None:
    host.make(LAN)
    host.make(DMZ)
    games = host.etc / "drivebay-games.conf"
    assert games.read_text().splitlines()[1:] == ["allow db-dmz", "allow db-lan"]
    assert host.readers(host.etc / "drivebay-daemon.conf") == ["daemon"]
    host.delete(LAN)  # which had made the helper set-uid
    assert games.read_text().splitlines()[1:] == ["allow db-dmz"]
    assert host.mode() == 0o4755
    host.delete(DMZ)
    assert host.mode() == 0o755
    assert not host.etc.exists()


def test_two_networks_with_one_bridge_of_the_host(host: Host) -> None:
    one = replace(LAN, mode="bridge", bridge="br0", subnet=None, uplink="eno1")
    two = replace(one, name="other")
    host.make(one)
    host.make(two)
    host.delete(one)
    assert (host.etc / "drivebay-games.conf").read_text().endswith("\nallow br0\n")
    host.delete(two)
    assert not host.etc.exists()


def test_a_user_who_is_taken_out_of_network_toml(host: Host) -> None:
    host.make(DMZ)
    fewer = replace(DMZ, allow_users=("daemon",))
    assert allowing.missing(host.networks, fewer) == ["let user 'games' put VMs into it no more"]
    allowing.allow(host.networks, fewer)
    assert not (host.etc / "drivebay-games.conf").exists()
    assert "games" not in host.conf.read_text()
    allowing.allow(host.networks, replace(DMZ, allow_users=()))
    assert not host.etc.exists()


def test_a_user_who_is_no_more_keeps_no_network_from_starting(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.make(LAN)
    host.make(DMZ)
    monkeypatch.setattr(allowing, "_known", lambda user: user != "games")
    allowing.allow(host.networks, DMZ)
    assert [path.name for path in sorted(host.etc.glob("drivebay-*"))] == ["drivebay-daemon.conf"]
    allowing.allow(host.networks, LAN)
    assert allowing.missing(host.networks, LAN) == []
    host.delete(DMZ)
    host.delete(LAN)
    assert not host.etc.exists()


@pytest.mark.parametrize("at", ["_write_user_file", "_write_settings", "_give_rights"])
def test_what_a_kill_leaves_is_mended_and_removed(
    host: Host, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    host.networks.create(LAN)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(allowing, at, killed)
        with pytest.raises(Killed):
            allowing.allow(host.networks, LAN)
    allowing.disallow(host.networks, LAN)
    assert not list(host.etc.glob("*"))
    assert host.mode() == 0o755
    assert allowing.missing(host.networks, LAN) == [
        f"let user 'games' put VMs into it ({host.etc}/drivebay-games.conf)",
        f"make '{host.helper}' set-uid, so that it can put TAPs into bridges",
    ]
    allowing.allow(host.networks, LAN)
    assert allowing.missing(host.networks, LAN) == []
    assert host.mode() == 0o4755


def test_a_helper_that_was_set_uid_before_stays_so(host: Host) -> None:
    host.helper.chmod(0o4711)
    host.make(LAN)
    host.delete(LAN)
    assert host.mode() == 0o4711


# ---- refused before anything is made ------------------------------------------------------------


def refused(network: Network) -> DrivebayError:
    with pytest.raises(DrivebayError) as caught:
        allowing.check(network)
    return caught.value


def test_a_user_has_to_be_there_and_root_needs_no_leave(host: Host) -> None:
    assert isinstance(refused(replace(LAN, allow_users=("nobodyatall",))), NotFound)
    assert isinstance(refused(replace(LAN, allow_users=("root",))), UsageError)
    assert not host.etc.exists()


def test_a_bridge_conf_that_the_user_cannot_read(host: Host) -> None:
    host.etc.mkdir()
    host.conf.write_text("allow virbr0\n")
    host.conf.chmod(0o640)
    error = refused(LAN)
    assert "user 'games' can't read" in str(error)
    assert error.hint == f"chmod 644 {host.conf}"


def test_a_helper_that_the_user_may_not_run(host: Host) -> None:
    host.helper.chmod(0o4710)
    assert f"user 'games' may not run '{host.helper}'" in str(refused(LAN))


def test_no_helper_at_all(host: Host) -> None:
    host.helper.unlink()
    assert "apt install qemu-system-common" in (refused(LAN).hint or "")


def test_who_has_decided_that_the_helper_has_no_rights_is_not_overruled(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = f"root root 755 {host.helper}\n"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        if command[0] == "dpkg-statoverride":
            return subprocess.CompletedProcess(command, 0, override, "")
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", run)
    error = refused(LAN)
    assert f"dpkg-statoverride says '{override.strip()}'" in str(error)
    assert host.mode() == 0o755


def test_a_file_system_without_acls(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_acls(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    host.networks.create(LAN)
    monkeypatch.setattr(os, "setxattr", no_acls)
    with pytest.raises(HostError, match="has no ACLs"):
        allowing.allow(host.networks, LAN)
    assert not list(host.etc.glob(".*")), "nothing that all could read is left"


def test_the_journal_says_what_was_made(host: Host) -> None:
    host.make(LAN)
    (made,) = json.loads((host.networks.of("lan") / "made.json").read_text())
    assert made["kind"] == "allowed"
    assert made["facts"] == {"users": ["games"], "mode_before": 0o755}


# ---- what the helper's few words mean -----------------------------------------------------------


@pytest.mark.parametrize(
    ("bridge", "said", "cause", "mend"),
    [
        ("db-lan", "access denied by acl file", "does not say so", "sudo drivebay net create lan"),
        ("br0", "access denied by acl file", "may not put VMs into the bridge 'br0'",
         "echo 'allow br0' | sudo tee -a"),
        ("br0", "failed to parse default acl file `x'", "there is no '", "echo 'allow br0'"),
        ("br0", "Unknown command `alow'\nfailed to parse default acl file `x'",
         "does not understand: Unknown command `alow'", "a line is 'allow BRIDGE'"),
        ("br0", "Invalid config line:\n  allow\n\nfailed to parse default acl file `x'",
         "does not understand: allow", "a line is"),
        ("db-lan", "failed to create tun device: Operation not permitted", "is not set-uid root",
         "dpkg-statoverride --update --add root root 4755"),
        ("db-lan", "failed to get mtu of bridge `db-lan': No such device", "no bridge 'db-lan'",
         "sudo drivebay net start lan"),
        ("eno1", "failed to add interface `tap0' to bridge `eno1': Operation not supported",
         "'eno1' takes no TAP", "ip link show type bridge"),
        ("br0", "failed to drop privileges", "gave no TAP: failed to drop", ""),
        ("br0", "", "it said nothing", ""),
    ],
)  # fmt: skip
def test_a_refusal_has_its_cause_and_its_mend(
    host: Host, bridge: str, said: str, cause: str, mend: str
) -> None:
    error = explained(host.helper, bridge, said)
    assert isinstance(error, StateError | NotFound)
    assert cause in str(error)
    assert mend in (error.hint or "")


def test_a_bridge_conf_that_its_reader_cannot_read(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.etc.mkdir()
    host.conf.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    error = explained(host.helper, "br0", "failed to parse default acl file `x'")
    assert "this user can't read it" in str(error)
    assert error.hint == f"sudo chmod 644 {host.conf}"
