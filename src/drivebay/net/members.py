"""Who has a place in a network: a VM's interface, its address for good, and its names.

Context: a short-lived process of root, which holds the network's lock while it changes something.
A place is kept when a VM is made, not when it starts, so that an address stays the VM's. DHCP and
DNS are told at once (`leases`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

from drivebay.errors import AlreadyExists, DrivebayError, StateError, UsageError
from drivebay.net.leases import Host, tell_hosts
from drivebay.net.model import Network
from drivebay.net.store import Networks
from drivebay.system.files import refusal, write_public

__all__ = ["Member", "give_back", "hosts_of", "keep", "read_members", "users"]

_FILE: Final = "members.json"


@dataclass(frozen=True)
class Member:
    """An interface of a VM; ``index`` counts the VM's interfaces. In mode bridge the LAN's DHCP
    gives the address."""

    mac: str
    vm: str
    index: int
    address: IPv4Address | None


def keep(
    networks: Networks,
    name: str,
    vm: str,
    index: int,
    mac: str,
    wanted: IPv4Address | None = None,
) -> IPv4Address | None:
    """Give an interface a place, or find the one that it has; a second time changes nothing.

    Returns: its address; None in mode bridge. Raises: NotFound, UsageError, AlreadyExists,
    StateError when the subnet is full.
    """
    with networks.locked(name):
        network = networks.load(name)
        members = read_members(networks, name)
        present = next((member for member in members if member.mac == mac), None)
        if present is not None and present.vm != vm:
            raise AlreadyExists(
                f"VM '{present.vm}' has the MAC address {mac} in network '{name}' already",
                hint=f"give VM '{vm}' another one",
            )
        others = [m for m in members if m.mac != mac and (m.vm, m.index) != (vm, index)]
        earlier = present or next((m for m in members if (m.vm, m.index) == (vm, index)), None)
        address = _address(network, others, earlier, wanted)
        member = Member(mac, vm, index, address)
        if member != present:
            _write(networks, network, [*others, member])
        return address


def _address(
    network: Network,
    others: Sequence[Member],
    earlier: Member | None,
    wanted: IPv4Address | None,
) -> IPv4Address | None:
    """The address of a member beside ``others``: what is wanted, what it had, or the first free."""
    if network.subnet is None:
        return None
    if wanted is not None:
        _check_wanted(network, others, wanted)
        return wanted
    if earlier is not None and earlier.address is not None:
        return earlier.address
    taken = {member.address for member in others}
    for address in map(IPv4Address, network.fixed()):
        if address not in taken:
            return address
    raise StateError(
        f"network '{network.name}' is full: each of its {len(network.fixed())} addresses for VMs "
        "is kept for one",
        hint="delete VMs that nobody needs, or make a network with a larger --subnet",
    )


def _check_wanted(network: Network, others: Iterable[Member], wanted: IPv4Address) -> None:
    assert network.subnet is not None
    if wanted not in network.subnet:
        raise UsageError(
            f"{wanted} is not in network '{network.name}', whose subnet is {network.subnet}"
        )
    if wanted in (network.subnet.network_address, network.subnet.broadcast_address):
        raise UsageError(f"{wanted} is the first or last of {network.subnet}, which no host has")
    if wanted == network.gateway:
        raise UsageError(f"{wanted} is the host's own address in network '{network.name}'")
    holder = next((member for member in others if member.address == wanted), None)
    if holder is not None:
        raise AlreadyExists(
            f"{wanted} is kept for VM '{holder.vm}' in network '{network.name}'",
            hint=f"drivebay net info {network.name}",
        )


def give_back(networks: Networks, vm: str, but: Collection[tuple[str, str]] = ()) -> None:
    """Free a VM's places everywhere, ``but`` those of (network, MAC) that it goes on having.

    A network that is broken is passed over: it must not keep a VM from being deleted.
    """
    for name in networks.names():
        with contextlib.suppress(DrivebayError):
            if vm not in users(networks, name):
                continue  # which needs no lock
            with networks.locked(name):
                members = read_members(networks, name)
                left = [m for m in members if m.vm != vm or (name, m.mac) in but]
                if left != members:
                    _write(networks, networks.load(name), left)


def users(networks: Networks, name: str) -> list[str]:
    """The VMs with a place in a network, sorted."""
    return sorted({member.vm for member in read_members(networks, name)})


def read_members(networks: Networks, name: str) -> list[Member]:
    """All places of a network. Raises: HostError, UsageError for a file that is broken."""
    path = networks.of(name) / _FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_read(mac, place) for mac, place in found.items()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise refusal("can't read", path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"'{path}' is not what Drivebay wrote: {error!r:.80}", hint=f"mend it: {path}"
        ) from error


def _read(mac: str, place: dict[str, Any]) -> Member:
    address = place["address"]
    return Member(
        mac=mac,
        vm=str(place["vm"]),
        index=int(place["interface"]),
        address=None if address is None else IPv4Address(address),
    )


def _write(networks: Networks, network: Network, members: list[Member]) -> None:
    """Write the places down, then tell DHCP and DNS; a start of dnsmasq would tell them, too."""
    values = {
        member.mac: {
            "vm": member.vm,
            "interface": member.index,
            "address": None if member.address is None else str(member.address),
        }
        for member in sorted(members, key=lambda member: (member.vm, member.index))
    }
    text = json.dumps(values, indent=2) + "\n"
    write_public(networks.of(network.name) / _FILE, text.encode())
    if network.subnet is not None:
        tell_hosts(networks, network, hosts_of(members))


def hosts_of(members: Iterable[Member]) -> list[Host]:
    """Members as DHCP and DNS know them.

    A VM's first interface in the network has the VM's name, and each other one NAME-INDEX, unless
    that is the name of another VM.
    """
    ordered = sorted(members, key=lambda member: (member.vm, member.index))
    names = {member.vm.lower() for member in ordered}
    seen: set[str] = set()
    hosts = []
    for member in ordered:
        vm = member.vm.lower()
        name: str | None = vm if vm not in seen else f"{vm}-{member.index}"
        if vm in seen and name in names:
            name = None
        seen.add(vm)
        if member.address is not None:
            hosts.append(Host(member.mac, member.address, name))
    return hosts
