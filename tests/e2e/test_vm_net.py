"""Guests in networks: who reaches whom, several interfaces, TAPs that go with QEMU, and the limits
of QEMU's own network.

The host is a network namespace (`net_bay`): target, QEMU and dnsmasq run in it.

    away 203.0.113.2 ── eno1 ┐
    street 192.0.2.2 ── eno2 ┤ host: 'lan' (nat), 'office' (bridge eno2), br9 of somebody else
                             └── guests a and b, started from a kernel and busybox
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from drivebay.vm.guest_image import GuestImage
from tests.e2e.net_bay import NetBay, drivebay, net_bay_in
from tests.e2e.vm_bay import APPEND
from tests.fakes.process import wait_until

pytestmark = [pytest.mark.needs_qemu, pytest.mark.needs_root]

AWAY, STREET = "203.0.113.2", "192.0.2.2"
PORT = 8000
BOOT_S = 300
# Each interface asks for an address; a shell on the console is all that runs.
INIT = b"""#!/bin/busybox sh
export PATH=/bin PS1='net# '
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done < /modules/order
busybox --install -s /bin
for path in /sys/class/net/e*; do
    ip link set "${path##*/}" up
    udhcpc -n -q -S -t 3 -T 1 -i "${path##*/}" -s /lease > /dev/null 2>&1
done
stty -F /dev/ttyS0 -echo
exec setsid -c sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1
"""
LEASE = b"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route add default via "${router%% *}"
"""


class Guests:
    """The host's command line, and the consoles of its guests."""

    def __init__(self, bay: NetBay, kernel: list[str]) -> None:
        self.bay = bay
        self._kernel = kernel
        self._consoles: dict[str, pexpect.spawn[str]] = {}

    def make(self, name: str, *words: str) -> str:
        return self.bay.ok("vm", "create", name, *self._kernel, *words)

    def console(self, name: str) -> pexpect.spawn[str]:
        if name not in self._consoles:
            self._consoles[name] = pexpect.spawn(
                "ip", ["netns", "exec", self.bay.host, *drivebay("vm", "console", name)],
                encoding="utf-8", timeout=BOOT_S, env=self.bay.environment,
                cwd=str(self.bay.folder), echo=False,
            )  # fmt: skip
            self._consoles[name].expect("net# ")
        return self._consoles[name]

    def do(self, name: str, command: str, seconds: float = 60) -> str:
        """Run a line in a guest's shell; what it wrote, and its exit code as the last word."""
        console = self.console(name)
        console.sendline(f"{command}; echo code=$?=")
        console.expect(r"code=(\d+)=", timeout=seconds)
        text, code = str(console.before), str(console.match[1])
        console.expect("net# ", timeout=seconds)
        return f"{text.strip()} {code}"

    def reaches(self, name: str, address: str) -> bool:
        return self.do(name, f"ping -c 1 -W 3 {address} > /dev/null").endswith(" 0")

    def hears(self, name: str, address: str, port: int) -> str:
        """What a TCP server says to a guest; the exit code alone when it does not reach it."""
        return self.do(name, f"nc -w 3 {address} {port} < /dev/null 2> /dev/null")

    def pid(self, name: str) -> int:
        return int(self.bay.json("vm", "info", name)["pid"])

    def end(self) -> None:
        for console in self._consoles.values():
            console.close(force=True)


@pytest.fixture(scope="module")
def guests(guest_image: GuestImage, folder: Path) -> Iterator[Guests]:
    kernel, initrd = folder / "kernel", folder / "initrd"
    kernel.write_bytes(guest_image.kernel.read_bytes())
    scripts = {"/init": INIT, "/lease": LEASE}
    modules = ("virtio_pci", "virtio_net")
    initrd.write_bytes(guest_image.initrd(scripts, modules))
    words = ["--image", "none", "--kernel", str(kernel), "--initrd", str(initrd),
             "--append", APPEND, "--memory", "96M"]  # fmt: skip
    (folder / "bay").mkdir(mode=0o711)
    with net_bay_in(folder / "bay") as bay:
        found = Guests(bay, words)
        try:
            _lay_out(found)
            yield found
        finally:
            found.end()


def _lay_out(guests: Guests) -> None:
    """Two networks with what is behind them, and two guests that start beside each other."""
    bay = guests.bay
    for uplink, label, ours, theirs in (
        ("eno1", "away", "203.0.113.1/24", f"{AWAY}/24"),
        ("eno2", "street", None, f"{STREET}/24"),
    ):
        namespace = bay.namespace(label)
        bay.link(bay.host, uplink, namespace, "eth0")
        if ours is not None:
            bay.ip(bay.host, f"addr add {ours} dev {uplink}")
        bay.ip(namespace, f"addr add {theirs} dev eth0")
        bay.answer_tcp(namespace, theirs.partition("/")[0], PORT)
    bay.answer_tcp(bay.host, "127.0.0.1", PORT)
    bay.ok("net", "create", "lan", "--subnet", "192.168.150.0/24")
    bay.ok("net", "create", "office", "--mode", "bridge", "--uplink", "eno2")
    script = bay.folder / "up.sh"
    script.write_text(f"#!/bin/sh\necho up $1 >> {bay.folder}/said\nip link set $1 up\n")
    down = bay.folder / "down.sh"
    down.write_text(f"#!/bin/sh\necho down $1 $(ls -d /sys/class/net/$1) >> {bay.folder}/said\n")
    for path in (script, down):
        path.chmod(0o755)
    guests.make("a", "--cpus", "2", "--net", "lan", "--net", "office")
    said = guests.make("b", "--cpus", "1", "--net", "lan,address=192.168.150.77/24", "--net",
                f"user,restrict=on,net=192.168.76.0/24,hostfwd=tcp::{PORT + 1}-:7000",
                "--net", f"tap,ifname=tap7,script={script},downscript={down}")  # fmt: skip
    assert "address   192.168.150.77 in network 'lan'" in said
    for name in ("a", "b"):
        bay.ok("vm", "start", name)


def test_guests_reach_each_other_what_is_behind_the_host_and_the_lan(guests: Guests) -> None:
    """And each has the address that was kept for it, under its name."""
    bay = guests.bay
    kept = {name: bay.json("vm", "info", name)["nets"][0]["addresses"][0] for name in ("a", "b")}
    assert kept["b"] == {"text": "192.168.150.77", "source": "static"}
    assert kept["a"]["source"] == "kept"
    for name in ("a", "b"):
        assert kept[name]["text"] in guests.do(name, "ip addr show dev eth0")
    assert guests.reaches("a", "192.168.150.77")
    assert kept["a"]["text"] in guests.do("b", "nslookup a 192.168.150.1")
    assert "203.0.113.1" in guests.hears("a", AWAY, PORT)  # as the host
    guests.do("a", "ip addr add 192.0.2.50/24 dev eth1")
    assert "192.0.2.50" in guests.hears("a", STREET, PORT)  # as itself


def test_a_guest_has_its_interfaces_and_they_their_ends_on_the_host(guests: Guests) -> None:
    bay = guests.bay
    nets = bay.json("vm", "info", "a")["nets"]
    assert [net["joins"] for net in nets] == ["lan", "office"]
    for number, net in enumerate(nets):
        assert net["mac"] in guests.do("a", f"cat /sys/class/net/eth{number}/address")
        shown = bay.ip(bay.host, f"-details link show {net['interface']}")
        assert f"alias drivebay VM a, net {number}" in shown
        assert "numqueues 2 " in shown
        assert " link/ether fe:" in shown
    assert "rx-1" in guests.do("a", "ls /sys/class/net/eth0/queues")


def test_a_restricted_guest_is_reached_and_reaches_nothing(guests: Guests) -> None:
    bay = guests.bay
    gateway = "192.168.76.2"
    assert "192.168.76.15" in guests.do("b", "ip addr show dev eth1")
    assert "127.0.0.1" not in guests.hears("b", gateway, PORT)
    guests.do("b", "(nc -l -p 7000 -e echo -n 'from inside' &)")
    assert bay.seen_as(bay.host, "127.0.0.1", PORT + 1) == "from inside"


def test_scripts_are_run_and_taps_go_with_qemu(guests: Guests) -> None:
    """Killed, not stopped; the TAP with a downscript stays for it until the next command."""
    bay = guests.bay
    said = bay.folder / "said"
    assert said.read_text() == "up tap7\n"
    before = [net["interface"] for net in bay.json("vm", "info", "b")["nets"]]
    assert before[1:] == [None, "tap7"]
    pid = guests.pid("b")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: before[0] not in bay.links(bay.host), "the end of b's TAP")
    assert "tap7" in bay.links(bay.host)
    assert "was not running" in bay.ok("vm", "stop", "b")
    assert said.read_text() == "up tap7\ndown tap7 /sys/class/net/tap7\n"
    assert "tap7" not in bay.links(bay.host)


def test_a_vm_that_goes_gives_back_its_addresses(guests: Guests) -> None:
    bay = guests.bay
    assert "'b'" in bay.refused("net", "delete", "lan", "--yes")
    shown = bay.ok("vm", "set", "b", "--net", "none", "--dry-run")
    assert "give back 192.168.150.77 in network 'lan'" in shown
    bay.ok("vm", "delete", "b", "--force", "--yes")
    bay.ok("vm", "delete", "a", "--force", "--yes")
    for name in ("lan", "office"):
        assert bay.json("net", "info", name)["vms"] == []
        bay.ok("net", "delete", name, "--yes")
    assert bay.links(bay.host) == ["eno1", "eno2", "lo"]
