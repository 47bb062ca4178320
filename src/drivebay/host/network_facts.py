"""What this host's network is like: read only, for the findings of `network`.

Context: a short-lived process. Root sees all; what a plain user can't see is None. Whether the
kernel can make bridges and translate addresses is tried in a network namespace of its own, which
ends with the trial: parts of a kernel can be modules that load by themselves, or be built in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from drivebay.errors import DrivebayError, NotFound
from drivebay.net.hostbridge.change import Change
from drivebay.net.leases import running
from drivebay.net.links import netlink
from drivebay.net.model import Network
from drivebay.net.programs import find_program
from drivebay.net.reconcile import state
from drivebay.net.store import Networks

__all__ = ["Facts", "Listener", "Standing", "read_facts"]

_SECONDS: Final = 20.0
_SYS: Final = Path("/proc/sys/net")
_LISTENER = re.compile(
    r"(?P<kind>udp|tcp)\s+\S+\s+\d+\s+\d+\s+(?P<address>\S+?)(?:%(?P<interface>[^:\s]+))?"
    r":(?P<port>\d+)\s+\S+(?:\s+users:\(\(\"(?P<name>[^\"]*)\",pid=(?P<pid>\d+))?"
)
# SIOCBRADDBR of linux/sockios.h; nft adds and ends with the namespace.
_MAKE_BRIDGE: Final = (
    "import fcntl, socket\nfcntl.ioctl(socket.socket(), 0x89A0, b'trial'.ljust(16, b'\\0'))"
)
_TRANSLATE: Final = (
    "table inet trial { chain out { type nat hook postrouting priority srcnat; masquerade; }; }"
)


@dataclass(frozen=True)
class Standing:
    """A network and how it stands; ``network`` None: its file is broken, and ``state`` says how."""

    name: str
    network: Network | None
    state: str
    dnsmasq: int | None = None  # its process


@dataclass(frozen=True)
class Listener:
    """A socket that waits for others; ``interface`` when it is bound to one."""

    kind: str
    address: str
    port: int
    interface: str | None = None
    program: str | None = None
    pid: int | None = None

    @property
    def everywhere(self) -> bool:
        return self.interface is None and self.address in ("0.0.0.0", "*", "[::]")


@dataclass(frozen=True)
class Facts:
    """``None`` anywhere: it is not known here."""

    root: bool
    networks: tuple[Standing, ...] = ()
    foreign_bridges: tuple[str, ...] = ()  # those of others that VMs join
    forwarding: bool | None = None
    uplinks: tuple[str, ...] = ()  # by which default routes lead
    strict: tuple[str, ...] = ()  # interfaces with a strict rp_filter
    bridged_filtered: bool = False  # net.bridge.bridge-nf-call-iptables
    rules: dict[str, Any] | None = None  # nft's
    legacy_rules: str = ""
    listeners: tuple[Listener, ...] = ()
    can_tap: bool = True
    can_vhost: bool = True
    can_bridge: bool | None = None
    can_translate: bool | None = None
    lacking: dict[str, str] = field(default_factory=dict)  # program: how to get it
    ping_groups: tuple[int, int] | None = None
    groups: tuple[int, ...] = ()  # of QEMU
    waiting: float | None = None  # seconds until the uplink's change is taken back


def read_facts(networks: Networks, foreign_bridges: Iterable[str]) -> Facts:
    """Look at everything."""
    root = os.geteuid() == 0
    uplinks = _uplinks()
    return Facts(
        root=root,
        networks=tuple(_standing(networks, name, root=root) for name in networks.names()),
        foreign_bridges=tuple(sorted(set(foreign_bridges))),
        forwarding=_switch("ipv4/ip_forward"),
        uplinks=uplinks,
        strict=tuple(name for name in uplinks if _is_strict(name)),
        bridged_filtered=bool(_switch("bridge/bridge-nf-call-iptables")),
        rules=_rules() if root else None,
        legacy_rules=_legacy_rules() if root else "",
        listeners=tuple(parse_listeners(_said("ss", "-H", "-l", "-n", "-p", "-t", "-u"))),
        can_tap=Path("/dev/net/tun").exists(),
        can_vhost=Path("/dev/vhost-net").exists(),
        can_bridge=_trial([sys.executable, "-I", "-c", _MAKE_BRIDGE]) if root else None,
        can_translate=_trial(["nft", "-f", "-"], _TRANSLATE) if root else None,
        lacking=_lacking(),
        ping_groups=_ping_groups(),
        groups=_groups(root=root),
        waiting=_waiting() if root else None,
    )


def _standing(networks: Networks, name: str, *, root: bool) -> Standing:
    try:
        network = networks.load(name)
    except DrivebayError as error:
        return Standing(name, None, str(error))
    if not root:  # the journal and the firewall are root's
        return Standing(name, network, "up")
    try:
        return Standing(name, network, state(networks, network), running(networks, name))
    except DrivebayError as error:
        return Standing(name, network, str(error))


def _switch(name: str) -> bool | None:
    with contextlib.suppress(OSError):
        return (_SYS / name).read_text().strip() != "0"
    return None


def _is_strict(interface: str) -> bool:
    """The larger of two values counts; 1 is strict, 2 is loose."""
    values = []
    for name in ("all", interface):
        with contextlib.suppress(OSError, ValueError):
            values.append(int((_SYS / f"ipv4/conf/{name}/rp_filter").read_text()))
    return max(values, default=0) == 1


def _uplinks() -> tuple[str, ...]:
    with contextlib.suppress(DrivebayError), netlink("read the host's routes") as ipr:
        names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in ipr.get_links()}
        indices = [route.get_attr("RTA_OIF") for route in ipr.get_default_routes(family=2)]
        return tuple(sorted({names[index] for index in indices if index in names}))
    return ()


def _rules() -> dict[str, Any] | None:
    try:
        found = json.loads(_said("nft", "-j", "list", "ruleset"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _legacy_rules() -> str:
    """Only where such tables are in use: to ask for one makes it."""
    with contextlib.suppress(OSError):
        if "filter" in Path("/proc/net/ip_tables_names").read_text().split():
            return _said("iptables-legacy", "-S")
    return ""


def parse_listeners(text: str) -> Iterable[Listener]:
    """The lines of `ss -Hlnptu`."""
    for line in text.splitlines():
        found = _LISTENER.match(line)
        if found is not None:
            yield Listener(
                found["kind"],
                found["address"],
                int(found["port"]),
                found["interface"],
                found["name"],
                int(found["pid"]) if found["pid"] else None,
            )


def _said(*command: str) -> str:
    """What a program prints; nothing where there is no such program, or it fails."""
    done = _run(list(command))
    return "" if done is None or done.returncode else done.stdout


def _trial(command: list[str], text: str = "") -> bool | None:
    """Whether a command works in a new network namespace; None where there can be none."""
    here = _run(["unshare", "--net", "true"])
    if here is None or here.returncode:
        return None
    done = _run(["unshare", "--net", *command], text)
    return None if done is None or done.returncode == 127 else done.returncode == 0


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str] | None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        )  # fmt: skip
    return None


def _lacking() -> dict[str, str]:
    found = {}
    for name in ("nft", "dnsmasq"):
        try:
            find_program(name)
        except NotFound as error:
            found[name] = error.hint or ""
    return found


def _ping_groups() -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ValueError):
        low, high = (_SYS / "ipv4/ping_group_range").read_text().split()
        return int(low), int(high)
    return None


def _groups(*, root: bool) -> tuple[int, ...]:
    """Those of QEMU's user."""
    from drivebay.system.processes import unprivileged

    identity = unprivileged() if root else None
    return (os.getegid(), *os.getgroups()) if identity is None else (identity.gid,)


def _waiting() -> float | None:
    change = Change()
    if not change.waits():
        return None
    return change.guarded() or 0.0
