"""`drivebay net`: who reaches whom, addresses and names, and that nothing else of the host changes.

The host is a network namespace, and so are the guests and the machines around it: a guest is a
namespace on the bridge, which asks for its address by DHCP as each other machine does.

    away (203.0.113.2, knows no way back) ── host ── bridge db-NAME ── guests
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.net_bay import NetBay, drivebay, net_bay_in
from tests.fakes.process import wait_until

pytestmark = pytest.mark.needs_root

AWAY = "203.0.113.2"
PORT = 8000
# What a guest's DHCP client would do with its lease: address, route, name server.
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
[ -z "$router" ] || ip route add default via $router
printf 'router=%s dns=%s domain=%s mtu=%s' "$router" "$dns" "$domain" "$mtu" > lease-$interface
"""


class Guest(NamedTuple):
    namespace: str
    interface: str
    mac: str


class Around:
    """The host of the tests, with a machine behind it, and guests."""

    def __init__(self, bay: NetBay) -> None:
        self.bay = bay
        self.away = bay.namespace("away")
        self.guests: list[Guest] = []
        bay.link(bay.host, "eno1", self.away, "eth0")
        bay.ip(bay.host, "addr add 203.0.113.1/24 dev eno1")
        bay.ip(self.away, f"addr add {AWAY}/24 dev eth0")
        bay.answer_tcp(self.away, AWAY, PORT)
        script = bay.folder / "udhcpc.sh"
        script.write_text(UDHCPC)
        script.chmod(0o755)

    def guest(self, bridge: str) -> Guest:
        """A machine on a bridge, without an address."""
        number = len(self.guests) + 1
        namespace = self.bay.namespace(f"guest{number}")
        guest = Guest(namespace, f"g{number}", f"52:54:00:00:01:{number:02x}")
        self.guests.append(guest)
        self.bay.link(self.bay.host, f"port{number}", namespace, guest.interface)
        self.bay.ip(namespace, f"link set {guest.interface} address {guest.mac}")
        self.bay.ip(self.bay.host, f"link set port{number} master {bridge}")
        return guest

    def ask(self, guest: Guest) -> tuple[str, dict[str, str]]:
        """Have it ask for an address. Returns: the address, and what else DHCP told."""
        script = str(self.bay.folder / "udhcpc.sh")
        words = ("-i", guest.interface, "-s", script, "-n", "-q", "-f", "-t", "10", "-T", "1")
        self.bay.ok_in(guest.namespace, "udhcpc", *words)
        told = (self.bay.folder / f"lease-{guest.interface}").read_text()
        shown = json.loads(self.bay.ip(guest.namespace, f"-json -4 addr show {guest.interface}"))
        address = shown[0]["addr_info"][0]["local"]
        return address, dict(entry.split("=", 1) for entry in told.split(" "))

    def keep(self, network: str, vm: str, guest: Guest) -> str:
        """Give a guest a place, as the making of a VM does."""
        return self._places(f"print(keep(Networks(), {network!r}, {vm!r}, 0, {guest.mac!r}))")

    def give_back(self, vm: str) -> None:
        """Free its places, as the deletion of a VM does."""
        self._places(f"give_back(Networks(), {vm!r})")

    def _places(self, call: str) -> str:
        """On the host: it may start dnsmasq anew."""
        imports = "from drivebay.net.members import give_back, keep\n"
        imports += "from drivebay.net.store import Networks\n"
        return self.bay.ok_in(self.bay.host, sys.executable, "-c", imports + call).strip()

    def resolve(self, guest: Guest, name: str, server: str) -> str:
        """What DNS says of a name; "" when it does not know it."""
        code = (
            "import socket,struct,sys\n"
            "q=b''.join(bytes([len(p)])+p.encode() for p in sys.argv[1].split('.'))+b'\\0'\n"
            "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(5)\n"
            "s.sendto(struct.pack('>6H',7,256,1,0,0,0)+q+struct.pack('>2H',1,1),(sys.argv[2],53))\n"
            "a=s.recv(999)\n"
            "print(socket.inet_ntoa(a[-4:]) if struct.unpack('>6H',a[:12])[3] else '')\n"
        )
        words = (sys.executable, "-c", code, name, server)
        return self.bay.ok_in(guest.namespace, *words).strip()


@pytest.fixture(scope="module")
def around(net_bay: NetBay) -> Around:
    return Around(net_bay)


@pytest.fixture
def host(own_folder: Path) -> Iterator[NetBay]:
    """A host on which nothing was made yet, with folders of its own."""
    with net_bay_in(own_folder) as bay:
        yield bay


def picture(bay: NetBay) -> dict[str, str]:
    """All of a host that networks could change, but for our folder."""
    shown = {
        command: bay.ok_in(bay.host, "sh", "-c", command)
        for command in (
            "nft list ruleset",
            "ip -details link | sed 's/gc_timer *[0-9.]*//'",
            "ip address",
            "ip route show table all",
            "ip rule",
            "cat /etc/resolv.conf",
            "cat /proc/sys/net/ipv4/ip_forward",
        )
    }
    pids = bay.ok_in(bay.host, "ip", "netns", "pids", bay.host).split()
    commands = [Path(f"/proc/{pid}/comm") for pid in pids]
    return {
        **shown,
        "dnsmasq": str([p for p in commands if p.exists() and "dnsm" in p.read_text()]),
    }


def test_behind_nat_guests_reach_what_does_not_know_them(around: Around) -> None:
    bay = around.bay
    subnet = bay.json("net", "create", "lan")["subnet"]
    assert subnet == "192.168.100.0/24"
    assert "inet6" not in bay.ip(bay.host, "addr show db-lan")  # no guest is the host's router
    web, db = around.guest("db-lan"), around.guest("db-lan")
    kept = around.keep("lan", "web", web)
    # While dnsmasq runs: it is told.
    assert kept == "192.168.100.2"
    address, told = around.ask(web)
    assert address == kept
    assert told["router"] == told["dns"] == "192.168.100.1"
    assert told["domain"] == "lan"
    assert bay.seen_as(web.namespace, AWAY, PORT) == "203.0.113.1"
    # A guest without a place gets an address, too, of the other half.
    other, _ = around.ask(db)
    assert int(other.rsplit(".", 1)[1]) >= 128
    assert around.resolve(db, "web", "192.168.100.1") == kept
    assert around.resolve(db, "web.lan", "192.168.100.1") == kept
    assert around.resolve(db, "nobody.lan", "192.168.100.1") == ""
    # Guests see each other as they are; nobody reaches them from outside.
    bay.answer_tcp(web.namespace, kept, PORT)
    assert bay.seen_as(db.namespace, kept, PORT) == other
    assert bay.seen_as(bay.host, kept, PORT) == "192.168.100.1"
    bay.ip(around.away, "route add 192.168.100.0/24 via 203.0.113.1")
    assert bay.seen_as(around.away, kept, PORT) is None
    info = bay.json("net", "info", "lan")
    assert [(entry["vm"], entry["address"]) for entry in info["members"]] == [
        ("web", kept),
        (None, other),
    ]
    assert info["members"][0]["lease"] is not None
    assert info["refused"] > 0
    assert info["state"] == "up"
    bay.ip(around.away, "route del 192.168.100.0/24")


def test_a_guest_with_a_false_address_gets_nowhere(around: Around) -> None:
    bay = around.bay
    guest = around.guest("db-lan")
    bay.ip(guest.namespace, f"addr add 192.168.77.7/24 dev {guest.interface}")
    bay.ip(guest.namespace, f"route add default dev {guest.interface} via 192.168.100.1 onlink")
    bay.ip(bay.host, "route add 192.168.77.7 dev db-lan")
    bay.ip(around.away, "route add 192.168.77.7 via 203.0.113.1")
    assert bay.seen_as(guest.namespace, AWAY, PORT) is None
    bay.ip(bay.host, "route del 192.168.77.7 dev db-lan")


def test_an_isolated_guest_reaches_the_host_and_nobody_else(around: Around) -> None:
    bay = around.bay
    bay.ok("net", "create", "cell", "--mode", "isolated", "--subnet", "192.168.120.0/29")
    guest, other = around.guest("db-cell"), around.guest("db-cell")
    around.keep("cell", "prisoner", guest)
    around.keep("cell", "neighbour", other)  # who has no place waits 3 s: dnsmasq asks around
    address, told = around.ask(guest)
    around.ask(other)
    assert told["router"] == ""
    bay.answer_tcp(guest.namespace, address, PORT)
    assert bay.seen_as(other.namespace, address, PORT) is not None
    assert bay.seen_as(bay.host, address, PORT) == "192.168.120.1"
    # Not even when it takes the host as its router, and though forwarding is on (for 'lan').
    bay.ip(guest.namespace, "route add default via 192.168.120.1")
    bay.ip(around.away, "route add 192.168.120.0/29 via 203.0.113.1")
    assert bay.seen_as(guest.namespace, AWAY, PORT) is None
    assert bay.seen_as(around.away, address, PORT) is None
    # One network does not reach the other, either.
    assert bay.seen_as(guest.namespace, "192.168.100.2", PORT) is None


def test_routed_guests_are_reached_by_who_has_a_route(around: Around) -> None:
    bay = around.bay
    bay.ok("net", "create", "far", "--mode", "routed", "--subnet", "10.77.0.0/24")
    guest = around.guest("db-far")
    around.keep("far", "web", guest)
    address, _ = around.ask(guest)
    bay.answer_tcp(guest.namespace, address, PORT)
    assert bay.seen_as(guest.namespace, AWAY, PORT) is None  # it has no way back
    bay.ip(around.away, "route add 10.77.0.0/24 via 203.0.113.1")
    assert bay.seen_as(guest.namespace, AWAY, PORT) == address
    assert bay.seen_as(around.away, address, PORT) == AWAY


def test_addresses_of_the_host_and_of_networks_are_refused(around: Around) -> None:
    bay = around.bay
    bay.ip(bay.host, f"route add 10.99.0.0/16 via {AWAY} table 77")  # as a VPN has one
    said = bay.refused("net", "create", "x", "--subnet", "10.99.7.0/24")
    assert "overlaps a route of this host: 10.99.0.0/16 by eno1" in said
    said = bay.refused("net", "create", "x", "--subnet", "192.168.100.128/25")
    assert "overlaps 192.168.100.0/24 of network 'lan'" in said
    assert "x" not in bay.ok("net", "list", "-q").split()


def test_what_was_made_is_mended_by_a_start(around: Around) -> None:
    bay = around.bay
    assert bay.ok("net", "start", "lan") == "lan: nothing to do\n"
    bay.ok_in(bay.host, "nft", "flush", "ruleset")
    assert "put the firewall table" in bay.json("net", "info", "lan")["state"]
    assert bay.ok("net", "start") == "".join(
        f"{name}: put the firewall table 'inet drivebay_{name}' in place\n"
        for name in ("cell", "far", "lan")
    )
    bay.ok_in(bay.host, "nft", "delete", "rule", "inet", "drivebay_lan", "forward", "handle",
              first_rule(bay))  # fmt: skip
    os.kill(made(bay, "lan", "dnsmasq")["pid"], signal.SIGKILL)
    bay.ip(bay.host, "link set db-lan down")
    bay.ip(bay.host, "tuntap add dbtap0 mode tap")
    bay.ok_in(bay.host, "ip", "link", "set", "dbtap0", "alias", "drivebay VM web, net 0")
    assert bay.ok("net", "start", "lan").splitlines() == [
        "lan: put the firewall table 'inet drivebay_lan' in place",
        "lan: turned 'db-lan' on",
        "lan: started dnsmasq, which gives addresses and names in 192.168.100.0/24",
        "lan: put 'dbtap0' of VM 'web' into 'db-lan'",
    ]
    assert bay.ok("net", "start", "lan") == "lan: nothing to do\n"


def made(bay: NetBay, network: str, kind: str) -> dict[str, int]:
    entries = json.loads((bay.networks / network / "made.json").read_text())
    facts: dict[str, int] = next(e["facts"] for e in entries if e["kind"] == kind)
    return facts


def first_rule(bay: NetBay) -> str:
    listed = json.loads(bay.ok_in(bay.host, "nft", "-j", "list", "table", "inet", "drivebay_lan"))
    return str(next(entry["rule"]["handle"] for entry in listed["nftables"] if "rule" in entry))


def test_a_network_that_is_used_stays(around: Around) -> None:
    bay = around.bay
    vm = bay.networks.parent / "vms/web/vm.toml"  # a VM without its folder would not count
    vm.parent.mkdir(parents=True)
    vm.touch()
    assert "is used by VM 'web'" in bay.refused("net", "delete", "lan", "--yes")
    around.give_back("web")
    assert around.resolve(around.guests[0], "web", "192.168.100.1") == ""
    assert around.resolve(around.guests[0], "web.lan", "192.168.100.1") == ""
    # Who comes next has the address at once, though the lease of the one before has not ended.
    api = around.guest("db-lan")
    assert around.keep("lan", "api", api) == around.ask(api)[0] == "192.168.100.2"
    assert bay.json("net", "info", "lan")["state"] == "up"
    assert "has interfaces in it: dbtap0, port1" in bay.refused("net", "delete", "lan", "--yes")


def test_all_but_ours_is_as_before_after_a_deletion(host: NetBay) -> None:
    """The host has a firewall and a bridge of its own, and a network that the other mode took."""
    host.ok_in(host.host, "nft", "add table inet filter; add chain inet filter input "
               "{ type filter hook input priority 0; policy accept; }; "
               "add rule inet filter input tcp dport 25 counter reject")  # fmt: skip
    host.ok_in(host.host, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")
    host.ip(host.host, "link add br0 type bridge")
    host.ip(host.host, "addr add 192.168.100.1/24 dev br0")
    host.ip(host.host, "link set br0 up")
    host.link(host.host, "eno2", host.namespace("lan"), "eth0")
    host.ip(host.host, "link set eno2 down")
    before = picture(host)
    assert host.json("net", "create", "lan")["subnet"] == "192.168.101.0/24"
    host.ok("net", "create", "cell", "--mode", "isolated")
    host.ok("net", "create", "out", "--mode", "bridge", "--uplink", "eno2")
    assert picture(host) != before
    assert (
        host.ok_in(host.host, "nft", "list", "table", "inet", "filter")
        in before["nft list ruleset"]
    )
    for name in ("cell", "lan", "out"):
        host.ok("net", "delete", name, "--yes")
    assert picture(host) == before
    assert not [path for path in host.networks.iterdir() if not path.name.startswith(".lock-")]


def test_a_creation_that_was_killed_is_ended_or_taken_away(host: NetBay) -> None:
    """SIGKILL while dnsmasq starts: what is in its place never serves."""
    before = picture(host)
    false = host.folder / "bin/dnsmasq"
    false.parent.mkdir()
    false.write_text("#!/bin/sh\ntouch began\nexec sleep 600\n")
    false.chmod(0o755)
    words = ("env", f"PATH={false.parent}:{os.environ['PATH']}", *drivebay("net", "create", "lan"))
    program = host.start_in(host.host, *words)
    wait_until(lambda: (host.folder / "began").exists(), "a start of dnsmasq")
    program.send_signal(signal.SIGKILL)  # `ip netns exec` and `env` have become it
    program.wait(10)
    assert host.json("net", "list")[0]["state"].startswith("half made: has to start dnsmasq")
    said = host.refused("net", "create", "lan", "--mode", "isolated")
    assert "with other settings was broken off" in said
    host.ok("net", "create", "lan")
    assert host.json("net", "list")[0]["state"] == "up"
    host.ok("net", "delete", "lan", "--yes")
    assert picture(host) == before


@pytest.mark.parametrize(
    "mode", [[], ["--mode", "bridge", "--uplink", "eno1"]], ids=["nat", "bridge"]
)
def test_a_kill_before_any_effect_is_mended(host: NetBay, mode: list[str]) -> None:
    host.link(host.host, "eno1", host.namespace("lan"), "eth0")
    host.ip(host.host, "link set eno1 down")
    script = Path(__file__).with_name("net_kills.py")
    done = host.run_in(host.host, sys.executable, str(script), *mode)
    assert done.returncode == 0, done.stderr
    creations, deletions = map(int, done.stderr.split())
    assert creations >= 10
    assert deletions >= 5


def test_guests_are_in_the_hosts_lan(host: NetBay) -> None:
    """An uplink that carries nothing of the host: a bridge of ours has it, with its MAC."""
    around = Around(host)
    host.link(host.host, "eno2", around.away, "eth2")
    host.ip(host.host, "link set eno2 down")
    host.ip(around.away, "addr add 10.5.0.1/24 dev eth2")
    host.answer_tcp(around.away, "10.5.0.1", PORT)
    said = host.refused("net", "create", "out", "--mode", "bridge", "--uplink", "eno1")
    assert "carries the host's own traffic (203.0.113.1/24)" in said
    assert "hint: drivebay net host-bridge plan eno1" in said
    host.ok("net", "create", "out", "--mode", "bridge", "--uplink", "eno2")
    assert mac_of(host, "db-out") == mac_of(host, "eno2")
    guest = around.guest("db-out")
    host.ip(guest.namespace, f"addr add 10.5.0.7/24 dev {guest.interface}")
    wait_until(lambda: host.seen_as(guest.namespace, "10.5.0.1", PORT) == "10.5.0.7", "the LAN")
    said = host.refused("net", "create", "two", "--mode", "bridge", "--uplink", "eno2")
    assert "is the uplink of another network, in bridge 'db-out'" in said


def test_a_bridge_of_others_is_used_and_stays(host: NetBay) -> None:
    host.ip(host.host, "link add name br7 type bridge")
    host.link(host.host, "eno7", host.namespace("lan"), "eth0")
    host.ip(host.host, "link set eno7 master br7")
    words = ("net", "create", "out", "--mode", "bridge", "--uplink", "eno7")
    assert host.json(*words)["bridge"] == "br7"
    host.ok("net", "delete", "out", "--yes")
    assert host.links(host.host) == ["br7", "eno7", "lo"]
    # A bridge that is called as ours would be is not ours.
    host.ip(host.host, "link add name db-lan type bridge")
    assert "that Drivebay did not make" in host.refused("net", "create", "lan")
    assert "db-lan" in host.links(host.host)


def mac_of(bay: NetBay, interface: str) -> str:
    return str(json.loads(bay.ip(bay.host, f"-json link show {interface}"))[0]["address"])


def test_a_port_that_others_have_is_named(host: NetBay) -> None:
    code = "import socket,sys,time\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
    code += "s.bind(('0.0.0.0',53))\ntime.sleep(600)\n"
    host.start_in(host.host, sys.executable, "-c", code)
    wait_until(lambda: bool(host.ok_in(host.host, "ss", "-Hlun", "sport = :53")), "a server")
    before = picture(host)
    said = host.refused("net", "create", "lan")
    assert "dnsmasq of network 'lan' does not serve" in said
    assert "in use" in said
    assert picture(host) == before
    assert host.ok("net", "list", "-q") == ""
