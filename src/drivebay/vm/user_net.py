"""QEMU's user network: which addresses it has, as its own rule gives them.

Context: any; pure.

    10.0.2.0/24 (unless another is chosen)   .2 gateway, which is the host   .3 name server
                                             from .15 on: what its DHCP gives, the first at first
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from drivebay.errors import UsageError
from drivebay.vm.spec import NetSpec

__all__ = ["UserNet", "user_net"]

DEFAULT: Final = "10.0.2.0/24"
_LARGEST, _SMALLEST = 8, 29  # of an address' bits; a smaller one has no room for a guest
_DHCP: Final = 15
_DHCP_IN_A_SMALL_ONE: Final = 4


@dataclass(frozen=True)
class UserNet:
    """The addresses of one user network."""

    network: IPv4Network
    gateway: IPv4Address
    dns: IPv4Address
    dhcp_start: IPv4Address

    def has(self, address: str) -> bool:
        """Whether an address, or an address with a network's size, lies in it."""
        try:
            return IPv4Address(address.partition("/")[0]) in self.network
        except ValueError:
            return False


def user_net(net: NetSpec) -> UserNet:
    """The network of an interface of kind 'user'.

    Raises: UsageError for one that QEMU could not make, or addresses that are not in it.
    """
    network = _network(net.subnet or DEFAULT)
    first = network.network_address
    small = first + _DHCP >= network.broadcast_address
    found = UserNet(
        network, first + 2, first + 3, first + (_DHCP_IN_A_SMALL_ONE if small else _DHCP)
    )
    if net.dhcp_start is None:
        return found
    try:
        start = IPv4Address(net.dhcp_start)
    except ValueError:
        raise UsageError(
            f"dhcp_start '{net.dhcp_start[:80]}' is no IPv4 address", field="dhcp_start"
        ) from None
    taken = (first, network.broadcast_address, found.gateway, found.dns)
    if start not in network or start in taken:
        raise UsageError(
            f"dhcp_start {start} is no free address of the subnet {network}: {found.gateway} is "
            f"its gateway, {found.dns} its name server",
            hint=f"such as {found.dhcp_start}",
            field="dhcp_start",
        )
    return UserNet(network, found.gateway, found.dns, start)


def _network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        network = None
    if network is None or "/" not in text:
        six = ": QEMU's own network is IPv4 only here" if ":" in text else ""
        raise UsageError(
            f"'{text[:80]}' is no IPv4 network{six}", hint="such as 192.168.76.0/24", field="subnet"
        )
    if not _LARGEST <= network.prefixlen <= _SMALLEST:
        raise UsageError(
            f"a user network has from /{_LARGEST} to /{_SMALLEST}, and '{text[:80]}' is "
            f"/{network.prefixlen}",
            hint="such as 192.168.76.0/24",
            field="subnet",
        )
    if str(network) != text:
        raise UsageError(
            f"the network '{text[:80]}' is written {network}",
            hint=f"an address of it does not name it: subnet={network}",
            field="subnet",
        )
    return network
