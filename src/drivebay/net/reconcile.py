"""What a network should be, against what is: the difference, step by step.

Context: a short-lived process of root, which holds the network's lock while it does the steps.
This is the one way by which anything of a network comes to be: at its creation, at a start after a
reboot, and after a kill at any moment. A second run finds nothing to do.

The firewall comes first, so that no guest ever has more than it should.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Interface
from typing import Final

from drivebay.errors import StateError
from drivebay.net import allowing, firewall, forwarding, leases, links, uplinks
from drivebay.net.journal import Journal
from drivebay.net.links import Link
from drivebay.net.members import hosts_of, read_members
from drivebay.net.model import Network
from drivebay.net.store import Networks, require_root
from drivebay.net.subnets import host_routes, overlapping_routes
from drivebay.net.taps import alias_of

__all__ = ["Step", "differences", "reconcile", "state"]

_PAST: Final = {"make": "made", "set": "set", "put": "put", "give": "gave", "turn": "turned",
                "start": "started", "mark": "marked", "keep": "kept", "let": "let"}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing to do; ``text`` begins with its verb: "make bridge 'db-lan'"."""

    text: str
    do: Callable[[], object]

    @property
    def done(self) -> str:
        """The same, after it."""
        verb, _, rest = self.text.partition(" ")
        return f"{_PAST[verb]} {rest}"


def reconcile(networks: Networks, network: Network) -> list[str]:
    """Make what is missing of a network. Returns: what it did, in sentences.

    Raises: InUse when another command takes too long; NotFound when a program or the uplink is
    missing; AlreadyExists, StateError, HostError.
    """
    require_root(f"net start {network.name}")
    with networks.locked(network.name):
        steps = list(differences(networks, networks.load(network.name)))
        for step in steps:
            step.do()
        return [step.done for step in steps]


def differences(networks: Networks, network: Network) -> Iterator[Step]:
    """What is missing of a network, found by looking only; to be done in this order.

    Raises: as `reconcile`, but InUse.
    """
    found = links.find_link(network.bridge)
    if network.subnet is not None:
        yield from _firewall(networks, network)
        if network.forwards and not forwarding.is_on():
            yield Step("turn on IPv4 forwarding of the host", partial(_turn_on, networks))
    if network.own_bridge:
        yield from _bridge(networks, network, found)
    if network.uplink is not None:
        yield from _uplink(networks, network, found)
    if network.subnet is not None:
        yield from _dnsmasq(networks, network, found)
    yield from _taps(networks, network)
    for text in allowing.missing(networks, network):
        yield Step(text, partial(allowing.allow, networks, network))  # the first does all
    if not network.made:
        yield Step("mark it as complete", partial(networks.mark_made, network))


def state(networks: Networks, network: Network) -> str:
    """Whether a network is up, down, or half made and what is missing; by looking only.

    A plain user sees nothing but the bridge. Raises: as `differences`.
    """
    bridge = links.find_link(network.bridge)
    if os.geteuid() != 0:
        return "down" if bridge is None else "up"
    steps = list(differences(networks, network))
    if not steps:
        return "up"
    if network.made and bridge is None:
        return "down"
    return f"half made: has to {steps[0].text}"


# ---- firewall, forwarding -----------------------------------------------------------------------


def _firewall(networks: Networks, network: Network) -> Iterator[Step]:
    """The table is as nft listed it after we put it there, of the ruleset that we want today."""
    made = Journal(networks.of(network.name)).find("table")
    wanted = firewall.fingerprint(firewall.ruleset(network))
    known = made is not None and made.facts.get("wanted") == wanted
    if not known or made is None or firewall.present(network) != made.facts.get("listed"):
        text = f"put the firewall table 'inet {network.table}' in place"
        yield Step(text, partial(_put_table, networks, network, wanted))


def _put_table(networks: Networks, network: Network, wanted: str) -> None:
    journal = Journal(networks.of(network.name))
    journal.note("table", network.table, wanted=None)
    firewall.put(network)
    journal.note("table", network.table, wanted=wanted, listed=firewall.present(network))


def _turn_on(networks: Networks) -> None:
    with networks.all_locked():
        forwarding.turn_on(networks)


# ---- the bridge ---------------------------------------------------------------------------------


def _bridge(networks: Networks, network: Network, found: Link | None) -> Iterator[Step]:
    name = network.bridge
    if found is None:
        yield Step(f"make bridge '{name}'", partial(_make_bridge, networks, network))
    elif not links.is_ours(network, found):
        raise links.taken_by_others(network)
    mac = network.mac if network.uplink is None else uplinks.load_uplink(network).mac
    if found is None or found.alias != network.alias:
        text = f"set the alias of '{name}' to '{network.alias}'"
        yield Step(text, partial(links.set_link, name, ifalias=network.alias))
    if mac != (network.mac if found is None else found.mac):
        text = f"set the MAC address of '{name}' to {mac}, its uplink's"
        yield Step(text, partial(links.set_link, name, address=mac))
    if found is not None and (found.stp or found.forward_delay):
        text = f"set '{name}' to forward at once, without spanning tree"
        yield Step(text, partial(links.forward_at_once, name))
    if network.mtu not in (None, 1500 if found is None else found.mtu):
        text = f"set the MTU of '{name}' to {network.mtu}"
        yield Step(text, partial(links.set_link, name, mtu=network.mtu))
    if found is None or not links.ipv6_is_shut_out(name):
        text = f"keep the host's IPv6 away from '{name}'"
        yield Step(text, partial(links.shut_out_ipv6, name))
    yield from _address(network, found)
    if found is None or not found.up:
        yield Step(f"turn '{name}' on", partial(links.set_link, name, state="up"))


def _make_bridge(networks: Networks, network: Network) -> None:
    Journal(networks.of(network.name)).note("bridge", network.bridge)
    links.add_bridge(network)


def _address(network: Network, found: Link | None) -> Iterator[Step]:
    if network.subnet is None or network.gateway is None:
        return
    address = IPv4Interface((network.gateway, network.subnet.prefixlen))
    if found is not None and address in links.address_of(found):
        return
    # The host may have moved since, into a LAN of these addresses.
    taken = overlapping_routes(network.subnet, host_routes(but=network.bridge))
    if taken:
        raise StateError(
            f"subnet {network.subnet} of network '{network.name}' overlaps a route that this host "
            f"has got: {taken[0]}; the host would no longer reach what is there",
            hint=f"delete network '{network.name}', and make it with another subnet",
        )
    text = f"give '{network.bridge}' the address {address}"
    yield Step(text, partial(links.add_address, network.bridge, address))


# ---- the uplink ---------------------------------------------------------------------------------


def _uplink(networks: Networks, network: Network, bridge: Link | None) -> Iterator[Step]:
    uplink = uplinks.load_uplink(network)
    if not network.own_bridge:
        if bridge is None or uplink.master != network.bridge:
            raise StateError(
                f"uplink '{uplink.name}' is not in bridge '{network.bridge}' any more, as it was "
                f"when network '{network.name}' was made",
                hint=f"delete the network, and make it anew: drivebay net delete {network.name}",
            )
        return
    if uplink.master != network.bridge:
        uplinks.check_uplink(network, uplink)
        text = f"put uplink '{uplink.name}' into '{network.bridge}'"
        yield Step(text, partial(_put_in, networks, network, uplink))
    if not uplink.up:
        text = f"turn uplink '{uplink.name}' on"
        yield Step(text, partial(links.set_link, uplink.name, state="up"))


def _put_in(networks: Networks, network: Network, uplink: Link) -> None:
    journal = Journal(networks.of(network.name))
    if journal.find("uplink") is None:  # else it was written before a kill, or before a reboot
        journal.note("uplink", uplink.name, up=uplink.up)
    _join(network, uplink.name)


# ---- TAPs of VMs that run -----------------------------------------------------------------------


def _taps(networks: Networks, network: Network) -> Iterator[Step]:
    """When somebody has removed the bridge, the TAPs of running VMs are in none."""
    places = {alias_of(member.vm, member.index): member.vm
              for member in read_members(networks, network.name)}  # fmt: skip
    if not places:
        return
    for link in links.all_links().values():
        if link.kind == "tun" and link.master is None and link.alias in places:
            text = f"put '{link.name}' of VM '{places[link.alias]}' into '{network.bridge}'"
            yield Step(text, partial(_join, network, link.name))


def _join(network: Network, port: str) -> None:
    bridge = links.find_link(network.bridge)
    assert bridge is not None
    links.set_link(port, master=bridge.index)


# ---- DHCP and DNS -------------------------------------------------------------------------------


def _dnsmasq(networks: Networks, network: Network, bridge: Link | None) -> Iterator[Step]:
    if bridge is not None and leases.serves(networks, network, bridge.index):
        return
    yield Step(
        f"start dnsmasq, which gives addresses and names in {network.subnet}",
        partial(_start_dnsmasq, networks, network),
    )


def _start_dnsmasq(networks: Networks, network: Network) -> None:
    bridge = links.find_link(network.bridge)
    assert bridge is not None
    hosts = hosts_of(read_members(networks, network.name))
    leases.start_dnsmasq(networks, network, bridge.index, hosts)
