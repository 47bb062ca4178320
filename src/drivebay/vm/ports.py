"""Ports of this host that lead into VMs: which are taken, and which is free.

Context: a short-lived process.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from drivebay.errors import InUse, StateError
from drivebay.vm.spec import Forward, VncSpec
from drivebay.vm.store import Vm
from drivebay.vm.vnc import FIRST_PORT

__all__ = ["check_free", "check_vnc_free", "free_forward", "free_vnc_port"]

_FIRST: Final = 2222
_LAST: Final = 2222 + 4096


def free_forward(others: Iterable[Vm], guest_port: int, beside: Iterable[Forward] = ()) -> Forward:
    """A forward from a port that neither a VM nor a program has, nor one ``beside`` it.

    Raises: StateError.
    """
    taken = {outside for outside, _ in _taken(others)} | {forward.outside for forward in beside}
    for port in range(_FIRST, _LAST):
        if ("tcp", port) not in taken and _opens("127.0.0.1", port):
            return Forward(port, guest_port)
    raise StateError(
        f"no port from {_FIRST} to {_LAST - 1} is free", hint="name one: --forward HOSTPORT:22"
    )


def check_free(forwards: Iterable[Forward], others: Sequence[Vm]) -> None:
    """Refuse a forward whose port another VM has, or twice the same. Raises: InUse."""
    forwards = list(forwards)
    taken = dict(_taken(others))
    seen: set[tuple[str, int]] = set()
    for forward in forwards:
        if forward.outside in taken:
            free = free_forward(others, forward.guest_port, forwards)
            raise InUse(
                f"port {forward.host_port} leads to VM '{taken[forward.outside]}' already",
                hint="choose another, such as --forward "
                f"{'udp:' * (forward.protocol == 'udp')}{free.host_port}:{forward.guest_port}",
            )
        if forward.outside in seen:
            raise InUse(f"port {forward.host_port} is forwarded twice")
        seen.add(forward.outside)


def free_vnc_port(others: Iterable[Vm]) -> int:
    """A port from VNC's first on that neither a VM nor a program has. Raises: StateError."""
    taken = dict(_taken(others))
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        if ("tcp", port) not in taken and _opens("127.0.0.1", port):
            return port
    raise StateError(
        f"no port from {FIRST_PORT} to {FIRST_PORT + 99} is free",
        hint="name one: --vnc ADDRESS:PORT",
    )


def check_vnc_free(vnc: VncSpec, others: Sequence[Vm]) -> None:
    """Raises: InUse when another VM has the port."""
    taken = dict(_taken(others))
    if ("tcp", vnc.port) in taken:
        raise InUse(
            f"port {vnc.port} leads to VM '{taken['tcp', vnc.port]}' already",
            hint=f"choose another, such as --vnc {vnc.address}:{free_vnc_port(others)}",
        )


def _taken(others: Iterable[Vm]) -> list[tuple[tuple[str, int], str]]:
    found = []
    for other in others:
        ports = [forward.outside for net in other.spec.nets for forward in net.forward]
        ports += [] if other.spec.vnc is None else [("tcp", other.spec.vnc.port)]
        found += [(port, other.name) for port in ports]
    return found


def _opens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return True
    return False
