"""DHCP and DNS of a network: the files of its dnsmasq, and the leases that it gave.

Context: a short-lived process of root; the leases may be read by all. dnsmasq is nobody, listens
on the network's bridge alone, reads no configuration but ours, and nobody's resolver is changed.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import Final

from drivebay.net.journal import Journal
from drivebay.net.model import Network
from drivebay.net.store import Networks, write_public
from drivebay.system.processes import start_ticks

__all__ = ["Host", "Lease", "configuration", "read_leases", "tell_hosts"]

_HOSTS, _NAMES, _LEASES, _CONF = "hosts", "names", "leases", "dnsmasq.conf"
_LEASE_TIME: Final = "1h"
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A MAC whose address is fixed; without a ``name`` DNS does not know it."""

    mac: str
    address: IPv4Address
    name: str | None


@dataclass(frozen=True)
class Lease:
    """An address that DHCP gave, until ``expires`` (seconds since 1970; 0: for ever).

    ``name`` is what the guest calls itself: whatever it likes, but a host name.
    """

    expires: int
    mac: str
    address: IPv4Address
    name: str | None


def read_leases(networks: Networks, name: str) -> list[Lease]:
    """The leases of a network; none where nobody can read them."""
    try:
        text = (networks.of(name) / _LEASES).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return list(parse_leases(text))


def parse_leases(text: str) -> Iterable[Lease]:
    """The lines of a lease file: EXPIRES MAC ADDRESS NAME CLIENT-ID."""
    for line in text.splitlines():
        match line.split():
            case [expires, mac, address, name, _] if expires.isdecimal():
                try:
                    found = IPv4Address(address)
                except AddressValueError:
                    continue  # IPv6, or broken
                named = name if _HOST_NAME.fullmatch(name) else None  # "*", or no name at all
                yield Lease(int(expires), mac.lower(), found, named)


def tell_hosts(networks: Networks, network: Network, hosts: Sequence[Host]) -> None:
    """Write who has which address and name; a running dnsmasq reads it at once."""
    folder = networks.of(network.name)
    write_public(folder / _HOSTS, hosts_text(hosts).encode())
    write_public(folder / _NAMES, names_text(hosts).encode())
    pid = running(networks, network.name)
    if pid is not None:
        os.kill(pid, signal.SIGHUP)


# ---- the files ----------------------------------------------------------------------------------


def hosts_text(hosts: Iterable[Host]) -> str:
    """dhcp-hostsfile: MAC,ADDRESS,NAME."""
    return "".join(
        ",".join(filter(None, (host.mac, str(host.address), host.name))) + "\n" for host in hosts
    )


def names_text(hosts: Iterable[Host]) -> str:
    """addn-hosts: known before the guest asks for an address, and when it has it by itself."""
    return "".join(f"{host.address} {host.name}\n" for host in hosts if host.name is not None)


def configuration(network: Network, folder: Path) -> str:
    """dnsmasq.conf of a network."""
    assert network.subnet is not None
    first, last = network.dynamic()
    lines = [
        f"# Drivebay writes this for network '{network.name}', anew at each start of dnsmasq.",
        "user=nobody",
        f"interface={network.bridge}",
        "except-interface=lo",
        "bind-dynamic",
        "no-hosts",
        f"addn-hosts={folder / _NAMES}",
        f"domain={network.name}",
        f"local=/{network.name}/",
        "expand-hosts",
        "domain-needed",
        "bogus-priv",
        f"dhcp-range={first},{last},{network.subnet.netmask},{_LEASE_TIME}",
        f"dhcp-hostsfile={folder / _HOSTS}",
        f"dhcp-leasefile={folder / _LEASES}",
        f"dhcp-lease-max={network.subnet.num_addresses}",
        "dhcp-authoritative",
        "dhcp-no-override",
        "quiet-dhcp",
        # A guest that calls itself so would become the proxy of the others (VU#598349).
        "dhcp-name-match=set:wpad,wpad",
        "dhcp-ignore-names=tag:wpad",
    ]
    if network.mode == "isolated":
        lines += ["no-resolv", "dhcp-option=option:router"]  # asks nobody; and no way out
    if network.mtu is not None:
        lines.append(f"dhcp-option=option:mtu,{network.mtu}")
    return "\n".join(lines) + "\n"


# ---- the process --------------------------------------------------------------------------------


def running(networks: Networks, name: str) -> int | None:
    """The process id of a network's dnsmasq, if it lives."""
    made = Journal(networks.of(name)).find("dnsmasq")
    if made is None:
        return None
    pid, ticks = made.facts.get("pid"), made.facts.get("start_ticks")
    alive = isinstance(pid, int) and ticks is not None and start_ticks(pid) == ticks
    return pid if alive else None
