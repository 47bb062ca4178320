"""The host's interfaces over netlink, and the bridge of a network.

Context: a short-lived process; what changes something needs root. The process' own network
namespace is meant. pyroute2 is imported late, since it takes a third of a second.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import AlreadyExists, HostError, NotFound
from drivebay.net.model import Network
from drivebay.system.files import refusal

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = [
    "Link",
    "add_bridge",
    "address_of",
    "carried",
    "find_link",
    "is_ours",
    "netlink",
    "ports",
    "remove_bridge",
    "set_link",
    "shut_out_ipv6",
    "taken_by_others",
]

_IPV6: Final = Path("/proc/sys/net/ipv6/conf")
_UP: Final = 1  # IFF_UP
_LINK_SCOPE: Final = 253  # RT_SCOPE_LINK, of fe80::/64 and such
_MAIN, _LOCAL = 254, 255  # tables of routes


@dataclass(frozen=True)
class Link:
    """An interface of the host. ``kind`` is "" for a card; ``master`` what it is a part of."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    ethernet: bool
    kind: str
    alias: str
    master: str | None
    stp: bool = False
    forward_delay: int = 0


@contextlib.contextmanager
def netlink(what: str) -> Iterator[IPRoute]:
    """Speak to the kernel. Raises: HostError, which begins "can't ``what``"."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ipr:
            yield ipr
    except NetlinkError as error:
        raise HostError(f"can't {what}", error.code) from error
    except OSError as error:
        raise HostError(f"can't {what}", error.errno or 0) from error


# ---- looking ------------------------------------------------------------------------------------


def all_links() -> dict[str, Link]:
    """Every interface, by its name. Raises: HostError."""
    with netlink("look at the host's interfaces") as ipr:
        found = list(ipr.get_links())
    names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in found}
    links = [_read(link, names) for link in found]
    return {link.name: link for link in links}


def find_link(name: str) -> Link | None:
    """One interface; None when there is none of that name. Raises: HostError."""
    return all_links().get(name)


def _read(link: Any, names: dict[int, str]) -> Link:
    info = link.get_attr("IFLA_LINKINFO")
    kind = str((info and info.get_attr("IFLA_INFO_KIND")) or "")
    data = info.get_attr("IFLA_INFO_DATA") if kind == "bridge" else None
    master = link.get_attr("IFLA_MASTER")
    return Link(
        index=link["index"],
        name=names[link["index"]],
        mac=str(link.get_attr("IFLA_ADDRESS") or ""),
        mtu=int(link.get_attr("IFLA_MTU") or 0),
        up=bool(link["flags"] & _UP),
        ethernet=link["ifi_type"] == 1,  # ARPHRD_ETHER
        kind=kind,
        alias=str(link.get_attr("IFLA_IFALIAS") or ""),
        master=names.get(master, f"interface {master}") if master else None,
        stp=bool(data and data.get_attr("IFLA_BR_STP_STATE")),
        forward_delay=int((data and data.get_attr("IFLA_BR_FORWARD_DELAY")) or 0),
    )


def ports(bridge: str) -> list[str]:
    """The interfaces in a bridge, sorted."""
    return sorted(link.name for link in all_links().values() if link.master == bridge)


def address_of(link: Link) -> list[IPv4Interface]:
    """The IPv4 addresses of an interface."""
    with netlink(f"read the addresses of '{link.name}'") as ipr:
        return [
            # IFA_LOCAL is its own; IFA_ADDRESS may be the other end's.
            IPv4Interface((entry.get_attr("IFA_LOCAL"), entry["prefixlen"]))
            for entry in ipr.get_addr(family=2, index=link.index)
        ]


def carried(link: Link) -> list[str]:
    """Addresses and routes that the host has on an interface, in words; without those that IPv6
    makes by itself for the cable alone."""
    with netlink(f"look at what '{link.name}' carries") as ipr:
        addresses = [
            f"{entry.get_attr('IFA_LOCAL') or entry.get_attr('IFA_ADDRESS')}/{entry['prefixlen']}"
            for entry in ipr.get_addr(index=link.index)
            if entry["scope"] != _LINK_SCOPE
        ]
        routes = [
            f"a route to {route.get_attr('RTA_DST') or 'everywhere'}"
            for family in (2, 10)
            for route in ipr.get_routes(family=family, oif=link.index)
            if route.get_attr("RTA_TABLE") == _MAIN and not _is_link_local(route)
        ]
    return addresses or routes


def _is_link_local(route: Any) -> bool:
    to = str(route.get_attr("RTA_DST") or "")
    return to.startswith(("fe80:", "ff"))


# ---- the bridge of a network --------------------------------------------------------------------


def is_ours(network: Network, link: Link) -> bool:
    """Whether a bridge was made for this network: it is marked, or has the MAC that only ours are
    made with, when we were killed before it was marked."""
    return link.kind == "bridge" and (link.alias == network.alias or link.mac == network.mac)


def taken_by_others(network: Network) -> AlreadyExists:
    """The error for an interface of the bridge's name that is not ours."""
    return AlreadyExists(
        f"there is an interface '{network.bridge}' that Drivebay did not make, so network "
        f"'{network.name}' can't have a bridge of this name",
        hint=f"see 'ip -details link show {network.bridge}', and choose another name",
    )


def add_bridge(network: Network) -> None:
    """Make the bridge, down; the kernel takes an alias only afterwards. It forwards at once and
    without spanning tree: guests make no loops, and would wait 30 s. Raises: HostError."""
    with netlink(f"make bridge '{network.bridge}'") as ipr:
        ipr.link(
            "add",
            ifname=network.bridge,
            kind="bridge",
            address=network.mac,
            br_stp_state=0,
            br_forward_delay=0,
        )


def set_link(name: str, **values: object) -> None:
    """Change an interface: alias, mtu, address, state, master. Raises: NotFound, HostError."""
    with netlink(f"change interface '{name}'") as ipr:
        ipr.link("set", index=_index(ipr, name), **values)


def forward_at_once(name: str) -> None:
    """Switch spanning tree and its delay of a bridge off. Raises: NotFound, HostError."""
    with netlink(f"change bridge '{name}'") as ipr:
        ipr.link(
            "set",
            index=_index(ipr, name),
            kind="bridge",
            br_stp_state=0,
            br_forward_delay=0,
        )


def add_address(name: str, address: IPv4Interface) -> None:
    """Give an interface an address, which it may have. Raises: NotFound, HostError."""
    from pyroute2.netlink.exceptions import NetlinkError

    with netlink(f"give {address} to '{name}'") as ipr:
        try:
            ipr.addr(
                "add",
                index=_index(ipr, name),
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                broadcast=str(address.network.broadcast_address),
            )
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise


def remove_bridge(network: Network) -> None:
    """Remove the bridge, if it is there and ours. Raises: HostError."""
    link = find_link(network.bridge)
    if link is not None and network.own_bridge and is_ours(network, link):
        with netlink(f"remove bridge '{network.bridge}'") as ipr:
            ipr.link("del", index=link.index)


def ipv6_is_shut_out(name: str) -> bool:
    """Whether an interface has no IPv6 of the host's."""
    try:
        return (_IPV6 / name / "disable_ipv6").read_text().strip() == "1"
    except OSError:
        return True  # a kernel without IPv6


def shut_out_ipv6(name: str) -> None:
    """Give the host no IPv6 there: else a guest that says it is a router would get the host's
    packets. What guests send to each other is not concerned. Raises: HostError."""
    path = _IPV6 / name / "disable_ipv6"
    try:
        if path.exists():
            path.write_text("1")
    except OSError as error:
        raise refusal("can't write", path, error) from error


def _index(ipr: IPRoute, name: str) -> int:
    found = ipr.link_lookup(ifname=name)
    if not found:
        raise NotFound(f"there is no interface '{name}'", hint="ip -brief link")
    return int(found[0])
