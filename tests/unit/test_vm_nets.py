"""vm/nets.py, vm/joining.py, vm/reaching.py: interfaces of a new or changed VM, places in networks,
downscripts, and where a guest is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from drivebay.disks.plan import Plan
from drivebay.errors import NotFound, StateError, UsageError
from drivebay.host import machine
from drivebay.net import bridge_helper, members, neighbours, scripts, taps
from drivebay.net.model import Network
from drivebay.net.store import Networks
from drivebay.net.taps import Tap
from drivebay.vm import joining, reaching
from drivebay.vm.agent import Interface
from drivebay.vm.nets import choose_nets, plan_leaving, plan_places, with_short_forms
from drivebay.vm.reaching import Address, addresses, host_interfaces
from drivebay.vm.spec import Forward, NetSpec
from drivebay.vm.ssh import SshSilent, endpoint
from drivebay.vm.store import Vm
from tests.unit.vm_world import World, bare

MAC = "52:54:00:00:00:01"
USER, LAN = NetSpec("user", ""), NetSpec("network", "", network="lan")


@pytest.fixture
def networks(world: World, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """'lan' by NAT and 'lab' isolated, as root has them."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(neighbours, "addresses", lambda networks, mac: [])
    networks = Networks()
    networks.folder.mkdir(parents=True)
    for name, mode, subnet in (("lan", "nat", "192.168.100.0/24"),
                               ("lab", "isolated", "192.168.101.0/24")):  # fmt: skip
        networks.create(Network(name, mode, f"db-{name}", IPv4Network(subnet), made=True))
    return networks


def chosen(world: World, *nets: NetSpec, before: tuple[NetSpec, ...] = ()) -> tuple[NetSpec, ...]:
    return choose_nets(world.vms, "web", nets, world.vms.others("web"), before)


# ---- what somebody wishes for -------------------------------------------------------------------


def test_short_forms_go_to_the_first_interface_that_has_them() -> None:
    nets = with_short_forms([LAN, USER], [Forward(80, 80)], "192.168.100.9/24")
    assert nets == (
        replace(LAN, address="192.168.100.9/24"),
        replace(USER, forward=nets[1].forward),
    )
    assert nets[1].forward == (Forward(80, 80),)
    fixed = replace(USER, address="10.0.2.50/24", gateway="10.0.2.2", dns=("10.0.2.3",))
    assert with_short_forms([fixed], address="dhcp") == (USER,)
    for nets in ((), (LAN,)):
        with pytest.raises(UsageError, match="--forward needs --net user"):
            with_short_forms(nets, [Forward(80, 80)])
    with pytest.raises(UsageError, match="need a --net"):
        with_short_forms([], dns=["1.1.1.1"])


def test_each_interface_has_a_mac_and_only_the_first_user_network_leads_to_ssh(
    world: World, networks: Networks
) -> None:
    nets = chosen(world, LAN, USER, USER, replace(USER, mac=MAC))
    assert len({net.mac for net in nets}) == 4
    assert nets[3].mac == MAC
    ports = [[forward.guest_port for forward in net.forward] for net in nets]
    assert ports == [[], [22], [], []]


def test_a_changed_vm_keeps_macs_and_the_port_of_ssh(world: World, networks: Networks) -> None:
    before = chosen(world, USER, LAN)
    same = chosen(world, replace(USER, restrict=True), LAN, before=before)
    assert [net.mac for net in same] == [net.mac for net in before]
    assert same[0].forward == before[0].forward
    other = chosen(world, LAN, USER, before=before)
    assert other[1].forward == before[0].forward


@pytest.mark.parametrize(
    ("wished", "gateway", "dns"),
    [
        (replace(USER, address="10.0.2.50/24"), "10.0.2.2", ("10.0.2.3",)),
        (replace(USER, address="10.1.0.50/24", subnet="10.1.0.0/24"), "10.1.0.2", ("10.1.0.3",)),
        (replace(LAN, address="192.168.100.9/24"), "192.168.100.1", ("192.168.100.1",)),
        (
            replace(LAN, network="lab", address="192.168.101.9/24"),
            None,
            ("192.168.101.1",),
        ),
        (
            replace(LAN, address="192.168.100.9/24", gateway="192.168.100.7", dns=("1.1.1.1",)),
            "192.168.100.7",
            ("1.1.1.1",),
        ),
    ],
)
def test_a_static_address_has_what_its_network_gives(
    world: World, networks: Networks, wished: NetSpec, gateway: str | None, dns: tuple[str, ...]
) -> None:
    (net,) = chosen(world, wished)
    assert (net.gateway, net.dns) == (gateway, dns)


def test_what_an_interface_can_not_join(
    world: World, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="not in network 'lan', whose subnet is") as caught:
        chosen(world, replace(LAN, address="10.0.0.5/24"))
    assert caught.value.hint == "such as 192.168.100.10/24"
    with pytest.raises(NotFound, match="no network 'nix'"):
        chosen(world, replace(LAN, network="nix"))
    with pytest.raises(NotFound, match="no network 'usr'") as missed:
        chosen(world, replace(LAN, network="usr"))
    assert str(missed.value.hint).startswith("is 'user' meant?")
    with pytest.raises(NotFound, match="no bridge 'db-test-none'"):
        chosen(world, NetSpec("bridge", "", bridge="db-test-none"))
    with pytest.raises(StateError, match="there is no script"):
        chosen(world, NetSpec("tap", "", ifname="tap1", script="/nonexistent"))


def test_doctor_says_what_an_interface_can_not_join(world: World, networks: Networks) -> None:
    tap = NetSpec("tap", MAC, ifname="tap1", script="/nonexistent/up")
    vm = world.vm(
        "web",
        nets=(replace(USER, mac="52:54:00:00:00:03"), replace(LAN, mac="52:54:00:00:00:02"), tap),
    )
    good, bad = machine._check_nets(vm)
    assert (good.level, good.what) == ("ok", "its interface can join network 'lan'")
    assert (bad.level, bad.subject) == ("problem", "networks")
    assert "there is no script '/nonexistent/up'" in bad.what


def test_a_plain_user_joins_what_root_has_allowed(
    world: World, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Networks, "__init__", lambda self, folder=None: setattr(
        self, "folder", networks.folder))  # fmt: skip
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(StateError, match="user 'nobody' may not join network 'lan'") as caught:
        joining.load_network("lan")
    assert "--allow-user nobody" in str(caught.value.hint)
    subnet = IPv4Network("192.168.102.0/24")
    networks.create(Network("free", "nat", "db-free", subnet, allow_users=("nobody",)))
    assert joining.load_network("free").bridge == "db-free"
    plan = Plan()
    plan_places(plan, "web", [LAN])
    assert plan.texts == []  # they are root's


# ---- places -------------------------------------------------------------------------------------


def test_places_are_kept_and_given_back_when_a_step_fails(world: World, networks: Networks) -> None:
    nets = chosen(world, LAN, replace(LAN, network="lab", address="192.168.101.9/24"))
    plan = Plan()
    plan_places(plan, "web", nets)
    assert plan.texts == [
        "keep an address for VM 'web' in network 'lan'",
        "keep 192.168.101.9 for VM 'web' in network 'lab'",
    ]
    plan.run()
    assert members.users(networks, "lan") == members.users(networks, "lab") == ["web"]
    assert addresses(nets[0]) == [Address("192.168.100.2", "kept")]
    leaving = Plan()
    plan_leaving(leaving, "web", nets[:1])
    assert leaving.texts == ["give back 192.168.101.9 in network 'lab'"]
    leaving.run()
    assert (members.users(networks, "lan"), members.users(networks, "lab")) == (["web"], [])

    failing = Plan()
    plan_places(failing, "other", [replace(LAN, mac="52:54:00:00:00:09")])

    def fail() -> None:
        raise StateError("no")

    failing.add("fail", fail)
    with pytest.raises(StateError):
        failing.run()
    assert members.users(networks, "lan") == ["web"]


def test_a_start_gives_back_what_the_vm_had_while_it_ran(world: World, networks: Networks) -> None:
    (net,) = chosen(world, LAN)
    plan = Plan()
    plan_places(plan, "web", [net, replace(LAN, network="lab", mac="52:54:00:00:00:09")])
    plan.run()
    with ExitStack() as stack:
        joining.join(world.vm("web"), Inherited(stack), stack)  # type: ignore[arg-type]
    assert members.users(networks, "lan") == members.users(networks, "lab") == []


def test_a_plain_users_tap_comes_from_the_helper(
    world: World, networks: Networks, host: Host, descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def helper(bridge: str) -> Tap:
        asked.append(bridge)
        return Tap("tap0", (os.open("/dev/null", os.O_RDONLY),))

    monkeypatch.setattr(bridge_helper, "tap_by_helper", helper)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    joined(world.vm("web", nets=(NetSpec("bridge", MAC, bridge="br0"),)))
    assert asked == ["br0"]


# ---- scripts ------------------------------------------------------------------------------------


class Host:
    """What is opened and run of a host's TAPs; nothing real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.there = {"tap1"}
        self.fails = ""
        monkeypatch.setattr(taps, "exists", lambda name: name in self.there)
        monkeypatch.setattr(taps, "open_named_tap", self._open)
        monkeypatch.setattr(taps, "set_persistent", self._keep)
        monkeypatch.setattr(scripts, "run", self._run)

    def _open(self, ifname: str, *, queues: int, alias: str) -> Tap:
        return Tap(ifname, (os.open("/dev/null", os.O_RDONLY),))

    def _keep(self, tap: Tap, on: bool) -> None:
        self.said.append(f"{tap.interface} {'stays' if on else 'goes'}")

    def _run(self, path: str, ifname: str, vm: str) -> None:
        self.said.append(f"{path} {ifname}")
        if path == self.fails:
            raise StateError(f"'{path}' failed", hint="look")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


class Inherited:
    """In place of run.Descriptors."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def inherit(self, descriptor: int) -> None:
        self._stack.callback(os.close, descriptor)


def tapped(world: World, ifname: str = "tap1", downscript: str | None = "/down") -> Vm:
    net = NetSpec("tap", MAC, ifname=ifname, script="/up", downscript=downscript)
    return world.vm("web", nets=(net,))


def joined(vm: Vm) -> None:
    with ExitStack() as stack:
        found = joining.join(vm, Inherited(stack), stack)  # type: ignore[arg-type]
        assert list(found) == [MAC]


@pytest.fixture
def descriptors() -> Iterator[None]:
    """No TAP stays open: here each is an open /dev/null."""

    def taps_open() -> int:
        links = list(Path("/proc/self/fd").iterdir())
        return sum(os.path.realpath(link) == "/dev/null" for link in links)

    before = taps_open()
    yield
    assert taps_open() == before


def test_a_downscript_is_run_once_after_the_end(
    world: World, host: Host, descriptors: None
) -> None:
    vm = tapped(world)
    joined(vm)
    plan = Plan()
    joining.plan_downscripts(plan, vm)
    assert plan.texts == ["run '/down' for tap1"]
    joining.leave(vm)
    joining.leave(vm)
    assert host.said == ["/up tap1", "/down tap1"]


def test_a_tap_that_we_made_stays_for_its_downscript(
    world: World, host: Host, descriptors: None
) -> None:
    vm = tapped(world, "new")
    joined(vm)
    joining.leave(vm)
    assert host.said == ["new stays", "/up new", "/down new", "new goes"]
    assert list(vm.folder.glob("downscripts*")) == []


def test_a_tap_without_a_downscript_goes_with_qemu(
    world: World, host: Host, descriptors: None
) -> None:
    vm = tapped(world, "new", downscript=None)
    joined(vm)
    joining.leave(vm)
    assert host.said == ["/up new"]


def test_a_script_that_fails_is_followed_by_its_downscript(
    world: World, host: Host, descriptors: None
) -> None:
    vm = tapped(world)
    host.fails = "/up"
    with pytest.raises(StateError, match="'/up' failed"):
        joined(vm)
    assert host.said == ["/up tap1", "/down tap1"]


def test_a_downscript_that_fails_is_not_run_again(
    world: World, host: Host, descriptors: None
) -> None:
    vm = tapped(world, "new")
    joined(vm)
    host.fails = "/down"
    with pytest.raises(StateError, match="'/down' failed") as caught:
        joining.leave(vm)
    assert caught.value.hint == "look   (it is not run again)"
    joining.leave(vm)
    assert host.said[2:] == ["/down new", "new goes"]


# ---- where a guest is ---------------------------------------------------------------------------


def test_addresses_come_with_the_surest_first(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "addresses", lambda networks, mac: ["192.168.100.2", "fd00::5"])
    said = [Interface("eth0", MAC.upper(), ("192.168.100.2", "10.9.9.9", "fe80::1"))]
    net = replace(LAN, mac=MAC)
    members.keep(networks, "lan", "web", 0, MAC)
    assert addresses(net, said) == [
        Address("192.168.100.2", "kept"), Address("fd00::5", "seen"), Address("10.9.9.9", "agent"),
    ]  # fmt: skip
    assert addresses(replace(USER, mac=MAC), said)[0] == Address("192.168.100.2", "agent")
    assert addresses(replace(net, mac="52:54:00:00:00:02", address="1.2.3.4/24"), [])[0] == (
        Address("1.2.3.4", "static")
    )


def test_ssh_finds_a_guest_by_a_forward_by_its_address_or_by_its_agent(
    world: World, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = NetSpec("bridge", MAC, bridge="br0")
    spec = bare("web", nets=(outside,))
    with pytest.raises(SshSilent, match="no address of VM 'web' is known yet"):
        endpoint(spec)
    said = [Interface("eth0", MAC, ("10.7.0.5",))]
    monkeypatch.setattr(reaching, "said_by_agent", lambda socket: said)
    assert endpoint(spec, Path("/agent")) == ("10.7.0.5", 22)
    monkeypatch.setattr(neighbours, "addresses", lambda networks, mac: ["10.7.0.6"])
    assert endpoint(spec, Path("/agent")) == ("10.7.0.6", 22)
    user = NetSpec("user", "52:54:00:00:00:02", (Forward(2222, 22),))
    assert endpoint(replace(spec, nets=(outside, user))) == ("127.0.0.1", 2222)
    with pytest.raises(StateError, match="no port of this host"):
        endpoint(replace(spec, nets=(replace(user, forward=(Forward(2222, 22, protocol="udp"),)),)))


def test_a_process_without_taps_has_no_ends_on_the_host() -> None:
    assert host_interfaces(os.getpid()) == {}
    assert host_interfaces(1 << 30) == {}
