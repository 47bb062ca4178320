"""The interfaces of a new or changed VM: MAC addresses, ports of the host, places in networks.

Context: a short-lived process. Planning only looks; places are kept by the plan's steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from drivebay.disks.places import data_folder
from drivebay.disks.plan import Plan
from drivebay.errors import UsageError
from drivebay.vm.identity import Origin, free_mac, host_machine_id
from drivebay.vm.joining import check_joins, load_network, wanted_address
from drivebay.vm.ports import check_free, free_forward
from drivebay.vm.spec import DHCP, SSH_PORT, Forward, NetSpec
from drivebay.vm.store import Vm, Vms
from drivebay.vm.user_net import user_net

__all__ = ["choose_nets", "plan_leaving", "plan_places", "with_short_forms"]

_NO_FORWARD: Final = "a VM in a network or a bridge is reached at its own address"


def with_short_forms(
    nets: Sequence[NetSpec],
    forward: Sequence[Forward] | None = None,
    address: str | None = None,
    gateway: str | None = None,
    dns: Sequence[str] | None = None,
) -> tuple[NetSpec, ...]:
    """What is said beside --net: forwards of the first user network, addresses of the first
    interface. A new address does away with the gateway and the name servers of the old one.

    Raises: UsageError.
    """
    found = list(nets)
    if forward is not None:
        at = next((number for number, net in enumerate(found) if net.kind == "user"), None)
        if at is None:
            raise UsageError("--forward needs --net user", hint=_NO_FORWARD if found else None)
        found[at] = replace(found[at], forward=tuple(forward))
    if not found and (address is not None or gateway is not None or dns is not None):
        raise UsageError("--address, --gateway and --dns need a --net")
    if address is not None:
        found[0] = replace(found[0], address=address, gateway=None, dns=())
    if gateway is not None:
        found[0] = replace(found[0], gateway=gateway)
    if dns is not None:
        found[0] = replace(found[0], dns=tuple(dns))
    return tuple(found)


def choose_nets(
    vms: Vms, name: str, wished: Sequence[NetSpec], others: Sequence[Vm],
    before: Sequence[NetSpec] = (), *, ssh: bool = True,
) -> tuple[NetSpec, ...]:  # fmt: skip
    """Wishes with what nobody said: MAC addresses, a port for ssh, gateways of static addresses.

    A port ``before`` that led to ssh stays. An interface keeps the MAC address of the one
    ``before`` at its place, if it is of its kind.
    Raises: InUse, NotFound, StateError, UsageError.
    """
    nets = [_completed(net) for net in _with_macs(vms, name, wished, others, before)]
    forwards = [forward for net in nets for forward in net.forward]
    check_free(forwards, others)
    at = next((number for number, net in enumerate(nets) if net.kind == "user"), None)
    if ssh and at is not None and not any(forward.leads_to_ssh for forward in forwards):
        kept = [f for net in before for f in net.forward if f.leads_to_ssh and not f.guest_address]
        taken = {forward.outside for forward in forwards}
        found = next((forward for forward in kept if forward.outside not in taken), None)
        found = found or free_forward(others, SSH_PORT, forwards)
        nets[at] = replace(nets[at], forward=(*nets[at].forward, found))
    check_joins(tuple(nets))
    return tuple(nets)


def _with_macs(
    vms: Vms, name: str, wished: Sequence[NetSpec], others: Sequence[Vm], before: Sequence[NetSpec]
) -> Iterator[NetSpec]:
    taken = {net.mac for other in others for net in other.spec.nets}
    taken |= {net.mac for net in wished if net.mac}
    for index, net in enumerate(wished):
        mac = net.mac
        if not mac and index < len(before) and before[index].kind == net.kind:
            mac = before[index].mac
        if not mac or (not net.mac and mac in taken):
            mac = free_mac(Origin(host_machine_id(data_folder()), vms.folder), name, index, taken)
        taken.add(mac)
        yield replace(net, mac=mac)


def _completed(net: NetSpec) -> NetSpec:
    """With gateway and name server of the network in which a static address lies."""
    if net.address == DHCP or "/" not in net.address:
        return net  # what is wrong with it, `seed.check_net` says
    try:
        address = IPv4Interface(net.address).ip
    except ValueError:
        return net
    gateway: IPv4Address | None = None
    dns: IPv4Address | None = None
    if net.kind == "user":
        own = user_net(net)
        if address in own.network:
            gateway, dns = own.gateway, own.dns
    elif net.network is not None:
        network = load_network(net.network)
        if network.subnet is not None and address not in network.subnet:
            raise UsageError(
                f"the address {address} is not in network '{network.name}', whose subnet is "
                f"{network.subnet}",
                hint=f"such as {network.subnet[10]}/{network.subnet.prefixlen}",
                field="address",
            )
        gateway, dns = network.gateway if network.forwards else None, network.gateway
    return replace(
        net,
        gateway=net.gateway or (None if gateway is None else str(gateway)),
        dns=net.dns or (() if dns is None else (str(dns),)),
    )


# ---- places in networks -------------------------------------------------------------------------


def plan_places(plan: Plan, name: str, nets: Sequence[NetSpec]) -> None:
    """Keep a place for each interface in a named network. A plain user's VMs have none: what they
    get is dnsmasq's to choose.
    """
    for index, net in enumerate(nets):
        if net.network is None or os.geteuid() != 0:
            continue
        _plan_place(plan, name, index, net, net.network)


def _plan_place(plan: Plan, name: str, index: int, net: NetSpec, network: str) -> None:
    from drivebay.net.members import give_back, keep
    from drivebay.net.store import Networks

    networks = Networks()
    what = "an address" if net.address == DHCP else str(wanted_address(net))
    plan.add(
        f"keep {what} for VM '{name}' in network '{network}'",
        lambda: keep(networks, network, name, index, net.mac, wanted_address(net)),
        lambda: give_back(networks, name),
    )


def plan_leaving(plan: Plan, name: str, stays: Sequence[NetSpec] = ()) -> None:
    """Give back a VM's places in networks, but those of the interfaces that it goes on having."""
    if os.geteuid() != 0:
        return
    from drivebay.net.members import give_back, read_members
    from drivebay.net.store import Networks

    networks = Networks()
    kept = [(net.network, net.mac) for net in stays if net.network is not None]
    for network in networks.names():
        left = [m for m in read_members(networks, network)
                if m.vm == name and (network, m.mac) not in kept]  # fmt: skip
        for member in left:
            where = "its place" if member.address is None else str(member.address)
            plan.add(f"give back {where} in network '{network}'",
                     lambda: give_back(networks, name, kept))  # fmt: skip
