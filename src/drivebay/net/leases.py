"""DHCP and DNS of a network: the files of its dnsmasq, and the leases that it gave.

Context: a short-lived process of root; the leases may be read by all. dnsmasq is nobody, listens
on the network's bridge alone, reads no configuration but ours, and nobody's resolver is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import Final

from drivebay.errors import StateError
from drivebay.net.journal import Journal
from drivebay.net.model import Network
from drivebay.net.programs import find_program
from drivebay.net.store import Networks
from drivebay.system.files import write_public
from drivebay.system.processes import start, start_ticks

__all__ = [
    "Host",
    "Lease",
    "configuration",
    "read_leases",
    "running",
    "serves",
    "start_dnsmasq",
    "stop_dnsmasq",
    "tell_hosts",
]

_HOSTS, _NAMES, _LEASES, _CONF = "hosts", "names", "leases", "dnsmasq.conf"
_LOG: Final = "dnsmasq.log"
_LEASE_TIME: Final = "1h"
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}", re.ASCII)
_START_SECONDS, _STOP_SECONDS = 10.0, 10.0
_LOOK_EVERY_S: Final = 0.01


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
    """Write who has which address and name; a running dnsmasq knows it at once.

    Raises: as `start_dnsmasq`.
    """
    folder = networks.of(network.name)
    write_public(folder / _HOSTS, hosts_text(hosts).encode())
    write_public(folder / _NAMES, names_text(hosts).encode())
    pid = running(networks, network.name)
    stale = stale_leases(network, read_leases(networks, network.name), hosts)
    if stale and pid is not None:
        # dnsmasq keeps address and name for who had them until the lease ends, and reads it once.
        bridge = Journal(folder).find("dnsmasq")
        assert bridge is not None
        start_dnsmasq(networks, network, bridge.facts["bridge"], hosts)
    elif stale:
        _forget_leases(folder, stale)
    elif pid is not None:
        os.kill(pid, signal.SIGHUP)


def stale_leases(
    network: Network, leases: Iterable[Lease], hosts: Iterable[Host]
) -> set[IPv4Address]:
    """The addresses that somebody has a lease of, and that are kept for another, or were kept for
    one who has given it back: nobody else gets one of the lower half."""
    macs = {host.address: host.mac for host in hosts}
    return {
        lease.address
        for lease in leases
        if macs.get(lease.address, "" if int(lease.address) in network.fixed() else lease.mac)
        != lease.mac
    }


def _forget_leases(folder: Path, addresses: Collection[IPv4Address]) -> None:
    """Take leases out of the file of a dnsmasq that does not run."""
    lines = (folder / _LEASES).read_text(encoding="utf-8", errors="replace").splitlines(True)
    left = [
        line
        for line in lines
        if not any(lease.address in addresses for lease in parse_leases(line))
    ]
    write_public(folder / _LEASES, "".join(left).encode())


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


def serves(networks: Networks, network: Network, bridge: int) -> bool:
    """Whether its dnsmasq listens, on the bridge of that index, with today's configuration."""
    made = Journal(networks.of(network.name)).find("dnsmasq")
    if made is None or made.facts.get("bridge") != bridge:
        return False
    folder = networks.of(network.name)
    try:
        written = (folder / _CONF).read_text(encoding="utf-8")
    except OSError:
        return False
    if written != configuration(network, folder):
        return False
    return running(networks, network.name) is not None and _listens(network)


def start_dnsmasq(networks: Networks, network: Network, bridge: int, hosts: Sequence[Host]) -> None:
    """Start dnsmasq, after the end of one that is of no use any more, and wait until it serves.

    Raises: NotFound without the program, StateError with what it said, HostError.
    """
    program = find_program("dnsmasq")
    stop_dnsmasq(networks, network.name)
    folder = networks.of(network.name)
    _check_passable(folder)
    write_public(folder / _CONF, configuration(network, folder).encode())
    tell_hosts(networks, network, hosts)
    log = folder / _LOG
    log.unlink(missing_ok=True)
    journal = Journal(folder)

    def note(pid: int) -> None:
        journal.note("dnsmasq", "dnsmasq", pid=pid, start_ticks=start_ticks(pid), bridge=bridge)

    child = start("dnsmasq", [program, *_words(folder)], log, outlives_us=True, noted=note)
    until = time.monotonic() + _START_SECONDS
    while not _listens(network):
        if child.ended() or time.monotonic() > until:
            child.stop()
            raise StateError(
                f"dnsmasq of network '{network.name}' does not serve: {child.last_words():.300}",
                hint=f"who else listens on {network.gateway}: sudo ss -lunp sport = :53",
            )
        time.sleep(_LOOK_EVERY_S)
    child.let_go()


def stop_dnsmasq(networks: Networks, name: str) -> None:
    """End a network's dnsmasq, whether the journal knows it or not."""
    known = running(networks, name)
    for pid in {*_processes(networks.of(name)), *([] if known is None else [known])}:
        ticks = start_ticks(pid)
        until = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            while ticks is not None and start_ticks(pid) == ticks:
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(_LOOK_EVERY_S)
    Journal(networks.of(name)).strike("dnsmasq")


def _words(folder: Path) -> list[str]:
    """Its own configuration alone, and no file for its process id, which the journal has."""
    return [
        "--keep-in-foreground",
        "--log-facility=-",
        "--pid-file",
        f"--conf-file={folder / _CONF}",
    ]


def _processes(folder: Path) -> list[int]:
    """The processes that run with our configuration: dnsmasq's command line is as we wrote it."""
    words = [word.encode() for word in _words(folder)]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().split(b"\0")[1:-1] == words:
                found.append(int(path.parent.name))
    return found


def _listens(network: Network) -> bool:
    """Whether anybody of this network namespace has the gateway's port 53."""
    assert network.gateway is not None
    wanted = f"{int.from_bytes(network.gateway.packed, sys.byteorder):08X}:0035"
    lines = Path("/proc/self/net/udp").read_text(encoding="ascii").splitlines()
    return any(line.split()[1] == wanted for line in lines[1:])


def _check_passable(folder: Path) -> None:
    """Raises: StateError when the user nobody, which dnsmasq becomes, can't reach its files."""
    for place in (folder, *folder.parents):
        if not place.stat().st_mode & 0o001:
            raise StateError(
                f"dnsmasq, which runs as the user nobody, can't pass through '{place}' to the "
                "files of the network",
                hint=f"chmod o+x {place}",
            )
