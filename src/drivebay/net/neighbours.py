"""Which addresses an interface of a guest has: from our leases, and from what the kernel met.

Context: a short-lived process of any user; sends nothing. A guest can claim each address that it
likes, so what is found is a hint for people, and nothing is decided by it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from drivebay.errors import HostError
from drivebay.net.leases import Lease, read_leases
from drivebay.net.links import netlink
from drivebay.net.store import Networks

__all__ = ["Neighbour", "addresses", "of_mac"]

# linux/neighbour.h: asked and never answered; not asked at all (multicast, loopback).
_INCOMPLETE, _FAILED, _NOARP = 0x01, 0x20, 0x40
_NO_ANSWER: Final = _INCOMPLETE | _FAILED | _NOARP


@dataclass(frozen=True)
class Neighbour:
    """An entry of the kernel's tables (ARP, and NDP of IPv6)."""

    mac: str
    address: str
    interface: str
    state: int


def addresses(networks: Networks, mac: str) -> list[str]:
    """The addresses of a MAC: those that it has a lease of, then what it was seen with."""
    leases: list[Lease] = []
    with contextlib.suppress(HostError):
        for name in networks.names():
            leases += read_leases(networks, name)
    met: list[Neighbour] = []
    with contextlib.suppress(HostError):
        met = _met()
    return of_mac(mac, leases, met, time.time())


def of_mac(mac: str, leases: Iterable[Lease], met: Iterable[Neighbour], now: float) -> list[str]:
    """The addresses of a MAC, each once; those that need an interface's name last."""
    mac = mac.lower()
    found = [
        str(lease.address)
        for lease in leases
        if lease.mac == mac and (lease.expires == 0 or lease.expires > now)
    ]
    seen = []
    for neighbour in met:
        if neighbour.mac.lower() != mac or neighbour.state & _NO_ANSWER:
            continue
        address = ip_address(neighbour.address)
        if not (address.is_multicast or address.is_loopback or address.is_unspecified):
            seen.append((*_rank(address), _spelled(address, neighbour.interface)))
    found += [entry[-1] for entry in sorted(seen)]
    return list(dict.fromkeys(found))


def _rank(address: IPv4Address | IPv6Address) -> tuple[bool, int, int]:
    return address.is_link_local, address.version, int(address)


def _spelled(address: IPv4Address | IPv6Address, interface: str) -> str:
    """An IPv6 address of one link is of use only with the link."""
    zone = f"%{interface}" if address.version == 6 and address.is_link_local else ""
    return f"{address}{zone}"


def _met() -> list[Neighbour]:
    """What is in the kernel's tables. Raises: HostError."""
    with netlink("read the table of neighbours") as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
        entries = [
            (entry.get_attr("NDA_LLADDR"), entry.get_attr("NDA_DST"), entry)
            for entry in ipr.get_neighbours()
        ]
    return [
        Neighbour(mac, address, str(names.get(entry["ifindex"], "?")), entry["state"])
        for mac, address, entry in entries
        if mac and address
    ]
