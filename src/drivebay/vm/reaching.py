"""Where a guest's interfaces are: the host's ends of them, and the addresses that they have.

Context: a command in the foreground. What a guest says or was seen with is a hint: it may claim
each address, and is recognized by its ssh key all the same.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError
from drivebay.vm.agent import Agent, Interface
from drivebay.vm.spec import DHCP, NetSpec

__all__ = ["Address", "addresses", "host_interfaces", "said_by_agent"]

AGENT_SECONDS: Final = 1.0
_TAP_OF_QEMU = re.compile(r"tap,id=net(\d+),fds?=(\d+)")
_IN_FDINFO = re.compile(r"^iff:\s*(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Address:
    """One address, and how it is known: 'static', 'kept', 'seen' or 'agent'."""

    text: str
    source: str


def addresses(net: NetSpec, said: list[Interface] | None = None) -> list[Address]:
    """The addresses of an interface, the surest first; ``said`` is what its agent says."""
    found = [] if net.address == DHCP else [Address(net.address.partition("/")[0], "static")]
    if net.kind != "user":  # of those nobody outside of QEMU knows
        found += _kept(net) + _seen(net)
    for interface in said or ():
        if interface.mac.lower() == net.mac:
            found += [Address(text, "agent") for text in interface.addresses
                      if not ip_address(text).is_link_local]  # fmt: skip
    unique: dict[str, Address] = {}
    for each in found:
        unique.setdefault(each.text, each)
    return list(unique.values())


def _kept(net: NetSpec) -> list[Address]:
    if net.network is None:
        return []
    from drivebay.net.members import read_members
    from drivebay.net.store import Networks

    with contextlib.suppress(DrivebayError):
        return [
            Address(str(member.address), "kept")
            for member in read_members(Networks(), net.network)
            if member.mac == net.mac and member.address is not None
        ]
    return []


def _seen(net: NetSpec) -> list[Address]:
    from drivebay.net import neighbours
    from drivebay.net.store import Networks

    return [Address(text, "seen") for text in neighbours.addresses(Networks(), net.mac)]


def said_by_agent(socket: Path) -> list[Interface]:
    """The guest's interfaces as its agent says; none without one."""
    try:
        with Agent(socket, timeout_s=AGENT_SECONDS) as agent:
            return agent.network_addresses()
    except (DrivebayError, OSError):
        return []


def host_interfaces(pid: int) -> dict[int, str]:
    """The host's interfaces of a running QEMU, by the number of the VM's: what it was told, and
    what the kernel says of those descriptors. Empty when it ends meanwhile.
    """
    process = Path(f"/proc/{pid}")
    found = {}
    with contextlib.suppress(OSError):
        for word in (process / "cmdline").read_bytes().decode(errors="replace").split("\0"):
            tap = _TAP_OF_QEMU.match(word)
            if tap is not None:
                name = _IN_FDINFO.search((process / "fdinfo" / tap[2]).read_text())
                if name is not None:
                    found[int(tap[1])] = name[1]
    return found
