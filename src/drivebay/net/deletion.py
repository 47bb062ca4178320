"""The end of a network: what was made for it goes, last first, and nothing else.

Context: a short-lived process of root, which holds the network's lock. It goes by the journal, then
by the names that things of this network would have. What is there and is not ours stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

from drivebay.disks.plan import Plan
from drivebay.errors import InUse
from drivebay.net import allowing, firewall, forwarding, leases, links, uplinks
from drivebay.net.journal import Journal, Made
from drivebay.net.members import users
from drivebay.net.model import Network
from drivebay.net.store import Networks

__all__ = ["plan_deletion", "take_down"]


def plan_deletion(
    plan: Plan, networks: Networks, network: Network, gone: Collection[str] = ()
) -> None:
    """The steps that delete a network. Places of VMs that are ``gone`` count for nothing.

    Raises: InUse while VMs have places in it, or run in it.
    """
    _check_unused(networks, network, gone)
    for text, do in _removals(networks, network):
        plan.add(text, do)
    plan.add(
        f"delete the folder '{networks.of(network.name)}'", partial(_forget, networks, network)
    )


def take_down(networks: Networks, network: Network) -> None:
    """Take all of a network away at once, of which the creation did not come to its end."""
    for _, do in _removals(networks, network):
        do()
    _forget(networks, network)


def _check_unused(networks: Networks, network: Network, gone: Collection[str]) -> None:
    members = [vm for vm in users(networks, network.name) if vm not in gone]
    if members:
        vms = ", ".join(f"'{vm}'" for vm in members)
        raise InUse(
            f"network '{network.name}' is used by VM{'s' if len(members) > 1 else ''} {vms}",
            hint="delete these VMs first, or give them another network",
        )
    if not network.own_bridge:
        return  # who else is in a bridge of others is not our matter
    left = [port for port in links.ports(network.bridge) if port != network.uplink]
    if left:
        raise InUse(
            f"bridge '{network.bridge}' of network '{network.name}' has interfaces in it: "
            f"{', '.join(left)}",
            hint="VMs of other users that run in it; stop them first",
        )


def _removals(networks: Networks, network: Network) -> Iterator[tuple[str, Callable[[], object]]]:
    """What takes things away; each does nothing when its thing is not there."""
    journal = Journal(networks.of(network.name))
    made = {entry.kind: entry for entry in journal.entries()}
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "uplink": _way_of_uplink(network, made.get("uplink")),
        allowing.JOURNAL_KIND: (
            "let no plain user put VMs into it any more",
            partial(allowing.disallow, networks, network),
        ),
        "dnsmasq": ("end dnsmasq", partial(leases.stop_dnsmasq, networks, network.name)),
        "bridge": (f"remove bridge '{network.bridge}'", partial(links.remove_bridge, network)),
        "table": (
            f"remove the firewall table 'inet {network.table}'",
            partial(firewall.remove, network),
        ),
    }
    wanted = _kinds(network)
    ordered = [*reversed(made), *(kind for kind in wanted if kind not in made)]
    for kind in ordered:
        if kind in ways:
            text, do = ways[kind]
            yield text, partial(_remove, journal, kind, do)
    if network.forwards and forwarding.turns_back(networks, network.name):
        yield "turn IPv4 forwarding of the host off again", partial(_turn_back, networks, network)


def _kinds(network: Network) -> list[str]:
    """What there may be of a network, the last made first."""
    kinds = ["uplink"] if network.uplink is not None and network.own_bridge else []
    kinds += [] if network.subnet is None else ["dnsmasq"]
    kinds += ["bridge"] if network.own_bridge else []
    return kinds + ([] if network.subnet is None else ["table"])


def _way_of_uplink(network: Network, made: Made | None) -> tuple[str, Callable[[], object]]:
    up = made is None or bool(made.facts.get("up", True))
    return (
        f"take uplink '{network.uplink}' out of '{network.bridge}'",
        partial(uplinks.take_out, network, up=up),
    )


def _remove(journal: Journal, kind: str, do: Callable[[], object]) -> None:
    do()
    journal.strike(kind)


def _turn_back(networks: Networks, network: Network) -> None:
    with networks.all_locked():
        forwarding.turn_back(networks, network.name)


def _forget(networks: Networks, network: Network) -> None:
    with networks.all_locked():
        networks.delete(network.name)
