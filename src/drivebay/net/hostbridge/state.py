"""What an uplink has, and all that must be as it was again: `before.json`.

Context: root. Looks only; what it looks at is in ``kernel`` and below /proc/sys/net.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from drivebay.errors import HostError, UsageError
from drivebay.net.hostbridge.kernel import Entry, Kernel, attribute, attributes
from drivebay.system.processes import boot_id

__all__ = ["SETTINGS", "Before", "LinkState", "boot_seconds", "read_link", "read_uplink"]

SYSCTL: Final = Path("/proc/sys/net")
# What of /proc/sys/net/ipv[46]/conf/DEVICE goes with the addresses. addr_gen_mode is not here:
# a bridge that made addresses of its own would test them against the uplink's (``moves``).
SETTINGS: Final = (
    *(f"ipv4/{name}" for name in (
        "rp_filter", "forwarding", "arp_ignore", "arp_announce", "arp_filter", "proxy_arp",
        "accept_redirects", "send_redirects", "accept_source_route", "accept_local",
        "route_localnet",
    )),
    *(f"ipv6/{name}" for name in (
        "disable_ipv6", "forwarding", "accept_ra", "accept_ra_defrtr", "accept_ra_pinfo",
        "accept_ra_rt_info_max_plen", "autoconf", "use_tempaddr", "accept_redirects",
        "dad_transmits", "accept_dad",
    )),
)  # fmt: skip
ADDR_GEN_MODE: Final = "ipv6/addr_gen_mode"
_FOREVER: Final = 0xFFFFFFFF
_UP: Final = 1


def boot_seconds() -> float:
    """Seconds since the host started; goes on while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class LinkState:
    """A device of the network and what is on it. A VLAN device has its number, too."""

    name: str
    index: int
    mac: str
    mtu: int
    up: bool
    master: int = 0
    vlan: int | None = None
    vlan_protocol: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    addresses: list[Entry] = field(default_factory=list)
    routes: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Before:
    """The state to restore. ``clients`` and ``manager``: see those modules."""

    bridge: str
    uplink: LinkState
    vlans: list[LinkState]
    rules: list[Entry]  # those that name the uplink
    other_rules: list[Entry]
    boot: str
    taken: float
    clients: list[dict[str, Any]] = field(default_factory=list)
    manager: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Before:
        """Raises: UsageError when it is not what ``to_json`` has written."""
        try:
            read = json.loads(text)
            read["uplink"] = LinkState(**read["uplink"])
            read["vlans"] = [LinkState(**each) for each in read["vlans"]]
            return cls(**read)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"before.json is not what was written there: {error}") from error

    def age(self) -> float:
        return max(0.0, boot_seconds() - self.taken)


def read_uplink(kernel: Kernel, name: str, bridge: str) -> Before:
    """Look at everything that a move would touch. Raises: HostError."""
    uplink = read_link(kernel, name)
    vlans = [
        read_link(kernel, attribute(link, "IFLA_IFNAME"))
        for link in kernel.links()
        if attribute(link, "IFLA_LINK") == uplink.index and kind_of(link) == "vlan"
    ]
    rules = kernel.rules()
    ours = [rule for rule in rules if name in rule_devices(rule)]
    others = [rule for rule in rules if name not in rule_devices(rule)]
    return Before(bridge, uplink, vlans, ours, others, boot_id(), boot_seconds())


def rule_devices(rule: Entry) -> set[str | None]:
    return {attribute(rule, "FRA_IIFNAME"), attribute(rule, "FRA_OIFNAME")}


def kind_of(link: dict[str, Any]) -> str | None:
    found = attributes(link, "IFLA_LINKINFO", "IFLA_INFO_KIND")
    return None if found is None else str(found)


def read_link(kernel: Kernel, name: str) -> LinkState:
    """Raises: HostError when there is no such device."""
    link = kernel.link(name)
    if link is None:
        raise HostError(f"no device '{name}'", 19, hint="ip -brief link")
    vlan = attributes(link, "IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_VLAN_ID")
    protocol = attributes(link, "IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_VLAN_PROTOCOL")
    return LinkState(
        name=name,
        index=link["index"],
        mac=attribute(link, "IFLA_ADDRESS"),
        mtu=attribute(link, "IFLA_MTU"),
        up=bool(link["flags"] & _UP),
        master=attribute(link, "IFLA_MASTER") or 0,
        vlan=vlan,
        vlan_protocol=protocol,
        settings=read_settings(name, (*SETTINGS, ADDR_GEN_MODE)),
        addresses=kernel.addresses(link["index"]),
        routes=sorted(kernel.routes(link["index"]), key=_near_first),
    )


def _near_first(route: Entry) -> bool:
    """A gateway can be named only when there is a way to it."""
    return any(name in ("RTA_GATEWAY", "RTA_VIA", "RTA_MULTIPATH") for name, _ in route["attrs"])


def setting_path(device: str, setting: str) -> Path:
    family, name = setting.split("/")
    return SYSCTL / family / "conf" / device / name


def read_settings(device: str, names: Iterable[str]) -> dict[str, str]:
    """The values of those settings that this kernel has."""
    found = {}
    for name in names:
        try:
            found[name] = setting_path(device, name).read_text().strip()
        except OSError:
            continue
    return found


def aged(entry: Entry, seconds: float) -> Entry:
    """An address or route whose lifetime has gone on meanwhile; never quite over."""
    attrs: list[list[Any]] = []
    for name, value in entry["attrs"]:
        if name == "IFA_CACHEINFO":
            value = {
                "ifa_preferred": _left(value["ifa_preferred"], seconds, least=0),
                "ifa_valid": _left(value["ifa_valid"], seconds, least=1),
                "cstamp": 0,
                "tstamp": 0,
            }
        elif name == "RTA_EXPIRES":
            value = _left(value, seconds, least=1)
        attrs.append([name, value])
    return {**entry, "attrs": attrs}


def _left(lifetime: int, seconds: float, least: int) -> int:
    return lifetime if lifetime == _FOREVER else max(least, lifetime - int(seconds))
