"""From wishes to a plan for a new network, or for the rest of one whose creation was broken off.

Context: a short-lived process of root, which holds the lock of the network's name while it runs
the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Network

from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, NotFound, StateError
from drivebay.net import allowing, links, uplinks
from drivebay.net.deletion import take_down
from drivebay.net.model import Network, bridge_name, check_network, check_network_name
from drivebay.net.reconcile import differences
from drivebay.net.store import Networks
from drivebay.net.subnets import check_free, choose, host_routes

__all__ = ["Wish", "plan_creation"]


@dataclass(frozen=True)
class Wish:
    """What `net create` was told; ``subnet`` None: a free one."""

    mode: str
    subnet: IPv4Network | None = None
    uplink: str | None = None
    mtu: int | None = None
    allow_users: tuple[str, ...] = ()


def plan_creation(plan: Plan, networks: Networks, name: str, wish: Wish) -> None:
    """The steps that make a network; all that was made is taken away again when one fails.

    Raises: UsageError, AlreadyExists, NotFound, StateError, InUse, HostError.
    """
    check_network_name(name)
    try:
        network = networks.load(name)
    except NotFound:
        network = _new(networks, name, wish)
        allowing.check(network)
        text = f"write '{networks.of(name)}/network.toml'"
        plan.add(text, partial(_begin, networks, network), partial(take_down, networks, network))
    else:
        _check_same(network, wish)
        plan.facts.append(f"a creation of network '{name}' was broken off, and goes on")
    for step in differences(networks, network):
        plan.add(step.text, step.do)
    if network.subnet is not None:
        plan.facts.append(f"subnet    {network.subnet}")


def _new(networks: Networks, name: str, wish: Wish) -> Network:
    network = Network(
        name=name,
        mode=wish.mode,
        bridge=bridge_name(name),
        subnet=wish.subnet,
        uplink=wish.uplink,
        mtu=wish.mtu,
        allow_users=wish.allow_users,
    )
    others = networks.others(name)
    if wish.mode == "bridge":
        check_network(network, f"network '{name}'")
        assert wish.uplink is not None
        network = replace(network, bridge=uplinks.bridge_for(name, wish.uplink))
        _check_mtu(network)
    elif wish.subnet is None:
        network = replace(network, subnet=choose(host_routes(but=network.bridge), others))
        check_network(network, f"network '{name}'")
    else:
        check_network(network, f"network '{name}'")
        check_free(wish.subnet, host_routes(but=network.bridge), others)
    return network


def _check_mtu(network: Network) -> None:
    """A packet that the uplink can't carry would be lost without a word."""
    uplink = uplinks.load_uplink(network)
    if network.mtu is not None and network.mtu > uplink.mtu:
        raise StateError(
            f"an MTU of {network.mtu} is more than that of uplink '{uplink.name}', {uplink.mtu}",
            hint="leave out --mtu: the uplink's is taken",
        )


def _begin(networks: Networks, network: Network) -> None:
    """Write the network down, unless somebody has taken its addresses since we looked."""
    with networks.all_locked():
        if network.subnet is not None:
            check_free(
                network.subnet, host_routes(but=network.bridge), networks.others(network.name)
            )
        found = links.find_link(network.bridge)
        if network.own_bridge and found is not None and not links.is_ours(network, found):
            raise links.taken_by_others(network)
        networks.create(network)


def _check_same(network: Network, wish: Wish) -> None:
    """Whether a network that is there is the one that is wished, and not complete."""
    same = (
        network.mode == wish.mode
        and wish.subnet in (None, network.subnet)
        and (network.uplink, network.mtu) == (wish.uplink, wish.mtu)
        and network.allow_users == wish.allow_users
    )
    if network.made:
        raise AlreadyExists(
            f"there is a network '{network.name}' already",
            hint=f"drivebay net info {network.name}",
        )
    if not same:
        raise StateError(
            f"a creation of network '{network.name}' with other settings was broken off",
            hint=f"drivebay net start {network.name} ends it; or take it away: "
            f"drivebay net delete {network.name}",
        )
