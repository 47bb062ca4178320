"""Plain users on a network, by QEMU's own helper: one who is allowed, and one who is not.

/etc, the helper's folder and dpkg's database are overlays in a mount namespace, so that the
machine's own stay as they are.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.net.bridge_helper import find_helper
from tests.e2e.net_bay import NetBay, drivebay, net_bay_in

CONF = "/etc/qemu/bridge.conf"
FOREIGN = "allow virbr0\n# theirs, without an end of line"
# As another user, which a program of root becomes after it has read all that it needs.
JOIN = """\
import os, pwd, sys
from drivebay.errors import DrivebayError
from drivebay.net.bridge_helper import tap_by_helper
user = pwd.getpwnam(sys.argv[1])
os.initgroups(user.pw_name, user.pw_gid)
os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
try:
    tap = tap_by_helper(sys.argv[2])
except DrivebayError as error:
    sys.exit(f"{error}\\nhint: {error.hint}")
frame = b"\\xff" * 6 + bytes.fromhex("525400000001") + b"\\x88\\xb5" + b"hello".ljust(50, b"\\0")
os.write(tap.descriptors[0], b"\\0" * 10 + frame)  # virtio's header goes before it
print(tap.interface, flush=True)
sys.stdin.read()
"""


class UserBay:
    """A host with a bridge, and with settings of QEMU that may be changed."""

    def __init__(self, bay: NetBay, folder: Path) -> None:
        self.bay = bay
        self.helper = find_helper()
        mounts = []
        for number, place in enumerate((Path("/etc"), self.helper.parent, Path("/var/lib/dpkg"))):
            over = folder / f"over{number}"
            if not place.is_dir():
                continue
            (over / "upper").mkdir(parents=True)
            (over / "work").mkdir()
            mounts.append(
                f"mount -t overlay overlay {place} "
                f"-o lowerdir={place},upperdir={over}/upper,workdir={over}/work"
            )
        script = " && ".join([*mounts, "echo mounted", "exec sleep 600"])
        holder = bay.start_in(bay.host, "sh", "-c", script)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mounted\n"
        self.holder = holder.pid

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.holder}", "--mount", "--wdns=/", *words]

    def ok(self, *words: str) -> str:
        return self.bay.ok_in(self.bay.host, *self.command(*words))

    def drivebay(self, *words: str) -> str:
        return self.ok(*drivebay(*words))

    def create(self) -> str:
        return self.drivebay("net", "create", "lan", "--allow-user", "games")

    def _join(self, user: str, bridge: str) -> list[str]:
        return self.command(sys.executable, "-c", JOIN, user, bridge)

    def join(self, user: str, bridge: str = "db-lan") -> str:
        """What a user is told who gets no TAP."""
        done = self.bay.run_in(self.bay.host, *self._join(user, bridge))
        assert done.returncode == 1, done.stdout
        return done.stderr

    @contextlib.contextmanager
    def joined(self, user: str) -> Iterator[str]:
        """The name of the TAP that a user gets, which is there while the block runs."""
        program = subprocess.Popen(
            ["ip", "netns", "exec", self.bay.host, *self._join(user, "db-lan")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.bay.environment,
        )
        assert program.stdout is not None
        try:
            yield program.stdout.readline().strip()
        finally:
            program.communicate(timeout=20)


@pytest.fixture
def world(own_folder: Path) -> Iterator[UserBay]:
    with net_bay_in(own_folder) as bay:
        yield UserBay(bay, own_folder)


def test_who_is_allowed_gets_on_the_bridge_and_another_is_refused(world: UserBay) -> None:
    bay = world.bay
    world.ok("sh", "-c", f'mkdir /etc/qemu; printf %s "{FOREIGN}" > {CONF}')
    world.create()
    assert world.drivebay("net", "start", "lan") == "lan: nothing to do\n"
    assert world.ok("cat", CONF).endswith(FOREIGN)

    with world.joined("games") as tap:
        assert f" {tap}: " in bay.ip(bay.host, "link show master db-lan")
        # The frame that went into the descriptor has come to the bridge.
        assert "52:54:00:00:00:01" in bay.ok_in(bay.host, "bridge", "fdb", "show", "dev", tap)
    assert tap not in bay.links(bay.host), "it goes with its descriptor"

    refused = world.join("daemon")
    assert "user 'daemon' may not put VMs into the bridge 'db-lan'" in refused
    assert "--allow-user daemon" in refused
    assert "may not put VMs into the bridge 'br7'" in world.join("games", "br7")

    world.drivebay("net", "delete", "lan", "--yes")
    assert world.ok("cat", CONF) == FOREIGN
    assert world.ok("ls", "/etc/qemu") == "bridge.conf\n"
    assert "may not put VMs into the bridge" in world.join("games")


def test_the_helper_is_set_uid_as_long_as_a_network_needs_it(world: UserBay) -> None:
    helper = str(world.helper)
    before = world.ok("stat", "-c", "%a", helper)
    world.create()
    assert world.ok("stat", "-c", "%a", helper) == "4755\n"
    assert "root root 4755" in world.ok("dpkg-statoverride", "--list", helper)
    world.drivebay("net", "delete", "lan", "--yes")
    assert world.ok("stat", "-c", "%a", helper) == before
    assert helper not in world.ok("dpkg-statoverride", "--list")
    assert "qemu" not in world.ok("ls", "/etc").split()


def test_why_a_user_gets_no_tap(world: UserBay) -> None:
    bay = world.bay
    assert "there is no '/etc/qemu/bridge.conf' yet" in world.join("games")
    world.create()
    world.ok("chmod", "755", str(world.helper))
    assert "is not set-uid root" in world.join("games")
    world.ok("chmod", "4755", str(world.helper))
    bay.ip(bay.host, "link delete db-lan")
    assert "hint: sudo drivebay net start lan" in world.join("games")
    bay.ip(bay.host, "link add db-lan type veth peer name other")
    assert "the interface 'db-lan' takes no TAP" in world.join("games")
