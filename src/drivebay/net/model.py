"""What a network is: its values, their checks, and the names of what it is made of.

Context: any; looks at nothing of the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tomllib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.system.tables import Table

__all__ = [
    "MODES",
    "Network",
    "check_network_name",
    "check_subnet",
    "read_network",
    "write_network",
]

MODES: Final = ("nat", "isolated", "routed", "bridge")
RESERVED: Final = ("user", "none", "tap", "bridge", "network")
MTU_LEAST, MTU_MOST = 576, 65521
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", re.ASCII)  # an interface's: 15, with db-
_INTERFACE = re.compile(r"[^/\s:]{1,15}")
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}\$?", re.ASCII)
# RFC 1918, and the addresses of RFC 6598, which no host on the internet has either.
_PRIVATE: Final = tuple(
    map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)


@dataclass(frozen=True)
class Network:
    """One network, as its network.toml tells it.

    ``bridge`` is the bridge that its VMs join: db-NAME, or in mode bridge one that others made.
    ``made`` is false while it is being created.
    """

    name: str
    mode: str
    bridge: str
    subnet: IPv4Network | None = None
    uplink: str | None = None
    mtu: int | None = None
    allow_users: tuple[str, ...] = ()
    made: bool = False

    @property
    def own_bridge(self) -> bool:
        """Whether the bridge is made by us, and goes with the network."""
        return self.bridge == bridge_name(self.name)

    @property
    def alias(self) -> str:
        """What our bridge is marked with in the kernel (ifalias), so that it is known as ours."""
        return f"drivebay network {self.name}"

    @property
    def table(self) -> str:
        """The nftables table, of family inet."""
        return f"drivebay_{self.name.replace('-', '_')}"

    @property
    def gateway(self) -> IPv4Address | None:
        """The host's own address in the network: the first."""
        return None if self.subnet is None else self.subnet[1]

    @property
    def mac(self) -> str:
        """Our bridge's, which would otherwise change with its ports; none of a card's maker."""
        digest = hashlib.sha256(self.alias.encode()).digest()
        return ":".join(f"{byte:02x}" for byte in (0x02, 0xDB, *digest[:4]))

    @property
    def forwards(self) -> bool:
        """Whether the host passes packets on for it."""
        return self.mode in ("nat", "routed")

    def fixed(self) -> range:
        """The addresses, as numbers, that are given to VMs for good: the lower half."""
        assert self.subnet is not None
        first = int(self.subnet.network_address)
        return range(first + 2, first + self.subnet.num_addresses // 2)

    def dynamic(self) -> tuple[IPv4Address, IPv4Address]:
        """First and last of the addresses for whoever else asks: the upper half."""
        assert self.subnet is not None
        return self.subnet[self.subnet.num_addresses // 2], self.subnet[-2]


def bridge_name(name: str) -> str:
    """The bridge that is ours for a network of that name."""
    return f"db-{name}"


def check_network_name(name: str) -> None:
    """Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name[:80]}' can't be the name of a network: 1 to 12 letters a-z, digits and '-', "
            "and no '-' at either end",
            hint="its bridge is called db-NAME, and an interface's name has 15 letters at most",
        )
    if name in RESERVED:
        raise UsageError(
            f"'{name}' can't be the name of a network, since --net reads it as a word of its own",
            hint=f"the words are {', '.join(RESERVED)}",
        )


def check_subnet(subnet: IPv4Network, mode: str) -> None:
    """Raises: UsageError when no network of that mode may have these addresses."""
    if not 16 <= subnet.prefixlen <= 29:
        raise UsageError(
            f"subnet {subnet} has the wrong size: from /16 to /29", hint="such as 192.168.100.0/24"
        )
    private = any(subnet.subnet_of(wide) for wide in _PRIVATE)
    if mode != "routed" and not private:
        raise UsageError(
            f"subnet {subnet} is not private: its guests would not reach the hosts on the "
            "internet that have these addresses",
            hint="take one of 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
        )
    if not private and (subnet.is_multicast or not subnet.is_global):
        raise UsageError(
            f"subnet {subnet} has a meaning of its own, so that no guest can have its addresses",
            hint="take one of 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
        )


def read_network(name: str, text: str) -> Network:
    """Read network.toml. Raises: UsageError, naming what is wrong."""
    try:
        table = Table(f"network.toml of '{name}'", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"network.toml of '{name}' is not TOML: {error}") from error
    network = Network(
        name=name,
        mode=table.one_of("mode", MODES, "nat"),
        bridge=table.take("bridge", str, required=True),
        subnet=_read_subnet(table),
        uplink=table.take("uplink", str),
        mtu=table.take("mtu", int),
        allow_users=table.texts("allow_users"),
        made=table.take("made", bool, False),
    )
    table.end()
    check_network(network, table.where)
    return network


def _read_subnet(table: Table) -> IPv4Network | None:
    text = table.take("subnet", str)
    return None if text is None else read_subnet(text, f"{table.where}: ")


def read_subnet(text: str, where: str = "") -> IPv4Network:
    """Read '192.168.100.0/24'. Raises: UsageError."""
    try:
        if "/" not in text:
            raise ValueError
        return IPv4Network(text)
    except ValueError:
        hint = "such as 192.168.100.0/24"
        with contextlib.suppress(ValueError):
            hint = f"is {IPv4Network(text, strict=False)} meant?" if "/" in text else hint
        raise UsageError(
            f"{where}'{text[:80]}' is no IPv4 subnet", hint=hint, field="subnet"
        ) from None


def check_network(network: Network, where: str) -> None:
    """Whether the values fit together. Raises: UsageError; ``where`` begins its sentence."""
    if network.mode == "bridge":
        if network.subnet is not None:
            raise UsageError(f"{where}: mode bridge has no subnet: the LAN's DHCP gives addresses")
        if network.uplink is None:
            raise UsageError(
                f"{where}: mode bridge needs an uplink, the host's interface into the LAN",
                hint="such as --uplink eno1; 'ip -brief link' shows the host's interfaces",
            )
    else:
        if network.subnet is None:
            raise UsageError(f"{where}: mode {network.mode} needs a subnet")
        check_subnet(network.subnet, network.mode)
        if network.uplink is not None:
            raise UsageError(f"{where}: only mode bridge has an uplink, not mode {network.mode}")
        if not network.own_bridge:
            raise UsageError(f"{where}: 'bridge' should be {bridge_name(network.name)}")
    for interface in filter(None, (network.bridge, network.uplink)):
        if not _INTERFACE.fullmatch(interface) or interface in (".", ".."):
            raise UsageError(f"{where}: '{interface[:80]}' can't be the name of an interface")
    if network.mtu is not None and not MTU_LEAST <= network.mtu <= MTU_MOST:
        raise UsageError(f"{where}: 'mtu' should be from {MTU_LEAST} to {MTU_MOST}", field="mtu")
    for user in network.allow_users:
        if not _USER.fullmatch(user):
            raise UsageError(f"{where}: '{user[:80]}' can't be the name of a user")


def write_network(network: Network) -> str:
    """Return the text of network.toml."""
    import tomlkit  # only here: whoever starts a VM only reads

    values: dict[str, Any] = {
        "mode": network.mode,
        "bridge": network.bridge,
        "subnet": None if network.subnet is None else str(network.subnet),
        "uplink": network.uplink,
        "mtu": network.mtu,
        "allow_users": list(network.allow_users) or None,
        "made": network.made,
    }
    return tomlkit.dumps({key: value for key, value in values.items() if value is not None})
