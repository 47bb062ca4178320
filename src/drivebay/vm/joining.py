"""A VM's interfaces at its start: TAPs are opened, put where they belong, and handed to QEMU.

Context: a short-lived process that holds the VM's lock. QEMU is sandboxed and has no rights: it
gets descriptors, and scripts are run by us. Nobody of ours is there when a guest ends by itself,
so what a downscript has to do then is written down, and done by the next command that stops,
starts or deletes the VM.
"""

from __future__ import annotations

import getpass
import os
from typing import TYPE_CHECKING

from drivebay.errors import StateError
from drivebay.vm.spec import NetSpec

if TYPE_CHECKING:
    from drivebay.net.model import Network

__all__ = ["bridge_of", "check_joins", "load_network"]


def load_network(name: str) -> Network:
    """A named network that this user may join. Raises: NotFound, StateError, UsageError."""
    from drivebay.net.store import Networks

    network = Networks().load(name)
    user = getpass.getuser()
    if os.geteuid() != 0 and user not in network.allow_users:
        raise StateError(
            f"user '{user}' may not join network '{name}'",
            hint=f"root allows it: sudo drivebay net allow {name} {user}",
        )
    return network


def bridge_of(net: NetSpec) -> str:
    """The bridge in which an interface of kind 'network' or 'bridge' is. Raises: NotFound."""
    if net.network is None:
        assert net.bridge is not None
        return net.bridge
    from drivebay.net.store import Networks

    return Networks().load(net.network).bridge


def check_joins(nets: tuple[NetSpec, ...]) -> None:
    """Refuse, before anything is made, interfaces that can't join what they should.

    Raises: NotFound, StateError, UsageError, HostError.
    """
    from drivebay.net import scripts
    from drivebay.net.taps import check_bridge

    for net in nets:
        if net.network is not None:
            load_network(net.network)
        elif net.bridge is not None:
            check_bridge(net.bridge)
        for path in filter(None, (net.script, net.downscript)):
            scripts.check(path)
