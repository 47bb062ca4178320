"""Which addresses are free for a network: none that the host has a route to.

Context: any; only `host_routes` looks at the host. A second network with the addresses of the
host's LAN, of a VPN or of docker would cut the host off from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, Final

from drivebay.errors import StateError
from drivebay.net.model import Network

__all__ = ["Route", "check_free", "choose", "host_routes"]

_CANDIDATES: Final = [IPv4Network(f"192.168.{third}.0/24") for third in range(100, 251)]
# 0.0.0.0/0, and its parts by which a VPN takes everything without replacing it (0.0.0.0/1, …).
_AS_GOOD_AS_DEFAULT: Final = 7


@dataclass(frozen=True)
class Route:
    """Where the host sends packets for some addresses; ``interface`` is None for nowhere."""

    to: IPv4Network
    interface: str | None

    def __str__(self) -> str:
        return f"{self.to} by {self.interface}" if self.interface else f"{self.to}, to nowhere"


def choose(routes: Iterable[Route], others: Iterable[Network]) -> IPv4Network:
    """A /24 that is free. Raises: StateError."""
    routes, others = list(routes), list(others)
    for candidate in _CANDIDATES:
        if not (overlapping_routes(candidate, routes) or overlapping_network(candidate, others)):
            return candidate
    raise StateError(
        f"none of {_CANDIDATES[0]} to {_CANDIDATES[-1]} is free: the host has routes to all",
        hint="choose a subnet that nobody near uses: --subnet 10.213.7.0/24",
    )


def check_free(subnet: IPv4Network, routes: Iterable[Route], others: Iterable[Network]) -> None:
    """Raises: StateError, naming what has these addresses."""
    other = overlapping_network(subnet, others)
    if other is not None:
        raise StateError(
            f"subnet {subnet} overlaps {other.subnet} of network '{other.name}'",
            hint="without --subnet a free one is chosen",
        )
    taken = overlapping_routes(subnet, routes)
    if taken:
        raise StateError(
            f"subnet {subnet} overlaps a route of this host: {taken[0]}; the host would no longer "
            "reach what is there",
            hint="without --subnet a free one is chosen",
        )


def overlapping_routes(subnet: IPv4Network, routes: Iterable[Route]) -> list[Route]:
    """Those for addresses of ``subnet``, the widest first, since it says most."""
    found = [
        route
        for route in routes
        if route.to.prefixlen > _AS_GOOD_AS_DEFAULT and route.to.overlaps(subnet)
    ]
    return sorted(found, key=lambda route: route.to.prefixlen)


def overlapping_network(subnet: IPv4Network, others: Iterable[Network]) -> Network | None:
    """The network that has addresses of ``subnet``."""
    for other in others:
        if other.subnet is not None and other.subnet.overlaps(subnet):
            return other
    return None


def host_routes(but: str) -> list[Route]:
    """The host's IPv4 routes, of all tables, without those of interface ``but``.

    Raises: HostError.
    """
    from drivebay.net.links import netlink

    with netlink("read the host's routes") as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
        found = [
            Route(IPv4Network((route.get_attr("RTA_DST"), route["dst_len"])), interface)
            for route in ipr.get_routes(family=2)
            if route.get_attr("RTA_DST") is not None
            for interface in _interfaces(route, names)
        ]
    return [route for route in found if route.interface != but]


def _interfaces(route: Any, names: dict[int, str]) -> list[str | None]:
    """By which interfaces a route leads: several when it has several next hops."""
    hops = route.get_attr("RTA_MULTIPATH")
    indices = [hop["oif"] for hop in hops] if hops else [route.get_attr("RTA_OIF")]
    return [names.get(index) for index in indices]
