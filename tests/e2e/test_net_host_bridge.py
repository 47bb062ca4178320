"""The host's uplink moved into a bridge: real devices and routes, in network namespaces."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.host_uplink import HostUplink, host_bridge
from tests.e2e.net_bay import net_bay_in
from tests.fakes.process import wait_until

pytestmark = pytest.mark.needs_root

ALL = ["10.9.0.2/24", "10.9.0.3/24", "fd00::2/64"]
STEPS = 5


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostUplink]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    with net_bay_in(tmp_path) as bay:
        yield HostUplink(bay)


@pytest.fixture
def busy(host: HostUplink) -> HostUplink:
    host.give_addresses()
    return host


def test_unconfirmed_it_goes_back_by_itself_and_an_open_connection_never_ends(
    busy: HostUplink,
) -> None:
    before, talk = busy.state(), busy.talk()
    talk.goes_on()
    # The login that it was typed in ends at once, with all that belongs to it.
    login = subprocess.Popen(
        ["ip", "netns", "exec", busy.bay.host,
         *host_bridge("apply", "eno1", "--yes", "--seconds", "10")],
        env=busy.bay.environment, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert login.wait(60) == 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(login.pid, signal.SIGKILL)
    assert busy.addresses("br0") == ALL
    assert busy.addresses("eno1") == []
    assert "iif br0 lookup 77" in busy.bay.ip(busy.bay.host, "rule")
    routes = busy.bay.ip(busy.bay.host, "route show table all")
    assert "default via 10.9.0.1 dev br0 proto dhcp src 10.9.0.3 metric 100 mtu 1400" in routes
    assert "nexthop via 10.9.0.9 dev br0 weight 1 onlink" in routes
    talk.goes_on()
    assert "waits for confirmation" in busy.refused("plan", "eno1")
    assert "waits for confirmation" in busy.refused("apply", "eno1", "--bridge", "br1", "--yes")
    wait_until(busy.nothing_waits, "the guardian's end")
    talk.goes_on()
    assert busy.state() == before
    times = talk.times()
    assert max(b - a for a, b in itertools.pairwise(times)) < 3, "never long away"
    talk.end()
    done = busy.run("plan", "eno1")
    assert "taken out of the bridge 'br0' again" in done.stderr
    assert "nobody confirmed it in time" in done.stderr


def test_another_login_confirms_and_undoes(busy: HostUplink) -> None:
    before = busy.state()
    busy.command("apply", "eno1", "--yes")
    guardian = busy.guardian()
    assert "is of 'eno1', and not of 'eth7'" in busy.refused("confirm", "eth7", code=2)
    done = busy.run("confirm", "eno1")
    assert "nobody that we know configures 'eno1'" in done.stderr
    assert "10.9.0.3/24, " in done.stderr, "what a person has to write"
    assert not _alive(guardian)
    assert busy.addresses("br0") == ALL
    busy.command("undo", "eno1")
    assert busy.state() == before
    assert "no change of this uplink waits" in busy.refused("undo", "eno1")


def test_killed_between_any_two_steps_it_ends_in_the_old_state(busy: HostUplink) -> None:
    before = busy.state()
    for number in range(STEPS):
        patch = (
            "from drivebay.net.hostbridge import application\n"
            "def run(steps):\n"
            f"    for _, do in steps[:{number}]:\n"
            "        do()\n"
            "    os.kill(os.getpid(), 9)\n"
            "application.run = run\n"
        )
        done = busy.run("apply", "eno1", "--yes", patch=patch)
        assert done.returncode == -signal.SIGKILL, done.stderr
        wait_until(busy.nothing_waits, f"the way back after step {number}")
        assert busy.state() == before, number


def test_a_step_that_fails_takes_all_back_at_once(busy: HostUplink) -> None:
    before = busy.state()
    patch = (
        "from drivebay.errors import StateError\n"
        "from drivebay.net.hostbridge import application\n"
        "real = application.all_steps\n"
        "def fail(): raise StateError('this step fails')\n"
        "application.all_steps = lambda *words: [*real(*words), ('fail', fail)]\n"
    )
    done = busy.run("apply", "eno1", "--yes", patch=patch)
    assert (done.returncode, done.stderr) == (1, "drivebay: error: this step fails\n")
    assert busy.nothing_waits()
    assert busy.state() == before


def test_without_its_guardian_a_change_is_confirmed_or_taken_back_by_the_next_command(
    busy: HostUplink,
) -> None:
    before = busy.state()
    busy.command("apply", "eno1", "--yes")
    os.kill(busy.guardian(), signal.SIGKILL)
    done = busy.run("plan", "eno1")
    assert "its guardian is gone" in done.stderr
    assert busy.state() == before
    busy.command("apply", "eno1", "--yes")
    os.kill(busy.guardian(), signal.SIGKILL)
    busy.command("confirm", "eno1")
    assert busy.addresses("br0") == ALL


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- addresses by DHCP --------------------------------------------------------------------------


def udhcpc(folder: Path) -> list[str]:
    """With Debian's own script, but for this machine's resolv.conf."""
    script = Path("/etc/udhcpc/default.script").read_text()
    (folder / "script").write_text(script.replace("/etc/resolv.conf", f"{folder}/resolv.conf"))
    return ["udhcpc", "-i", "eno1", "-s", f"{folder}/script", "-p", f"{folder}/pid"]


def dhclient(folder: Path) -> list[str]:
    """With Debian's own script, but for this machine's resolv.conf, hooks and name."""
    script = Path("/sbin/dhclient-script").read_text()
    script = script.replace("/etc/", f"{folder}/").replace("        set_hostname\n", "")
    (folder / "script").write_text(script)
    (folder / "conf").touch()
    return ["dhclient", "-4", "-sf", f"{folder}/script", "-pf", f"{folder}/pid", "-lf",
            f"{folder}/leases", "-cf", f"{folder}/conf", "eno1"]  # fmt: skip


@pytest.mark.parametrize("client", [udhcpc, dhclient])
def test_a_dhcp_client_goes_along_and_keeps_its_address(
    host: HostUplink, tmp_path: Path, client: Callable[[Path], list[str]]
) -> None:
    bay, leases = host.bay, tmp_path / "dnsmasq.leases"
    bay.start_in(
        host.lan, "dnsmasq", "--no-daemon", "--port=0", "--interface=eth0", "--bind-interfaces",
        "--conf-file=/dev/null", "--dhcp-range=10.9.0.100,10.9.0.150,1h", "--user=root",
        f"--dhcp-leasefile={leases}",
    )  # fmt: skip
    command = client(tmp_path)
    (tmp_path / "script").chmod(0o755)
    bay.start_in(bay.host, *command)
    wait_until(lambda: bool(host.addresses("eno1")), "an address by DHCP")
    (address,) = host.addresses("eno1")
    bay.ip(bay.host, "route add 10.88.0.0/16 via 10.9.0.1")
    host.command("apply", "eno1", "--yes")
    assert host.addresses("br0") == [address]
    assert host.addresses("eno1") == []
    assert _clients(host) == [["br0" if word == "eno1" else word for word in command]]
    routes = bay.ip(bay.host, "route show dev br0")
    assert "default via 10.9.0.1" in routes
    assert "10.88.0.0/16 via 10.9.0.1" in routes, "what the client has emptied is back"
    host.command("undo", "eno1")
    assert host.addresses("eno1") == [address]
    assert _clients(host) == [command]
    assert [line.split()[2] for line in leases.read_text().splitlines()] == [address[:-3]]


def _clients(host: HostUplink) -> list[list[str]]:
    """The command lines of the DHCP clients on the host."""
    pids = host.bay.ip(host.bay.host, f"netns pids {host.bay.host}").split()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids if _alive(int(pid))]
    words = [line.rstrip("\0").split("\0") for line in lines]
    return [each for each in words if each[0].endswith(("udhcpc", "dhclient"))]
