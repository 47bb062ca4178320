"""[[net]] of vm.toml: its keys, and which of them go with which kind.

Context: any; looks at no file.
"""

from __future__ import annotations

import re
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.system.tables import Table
from drivebay.vm.spec import DHCP, NET_KINDS, NIC_MODELS, NetSpec, read_forward
from drivebay.vm.user_net import user_net

__all__ = ["KEYS", "check_net_keys", "net_values", "read_net"]

# What each kind has beside the keys of all; the first of those that are no 'user' is needed.
KEYS: Final = {
    "user": ("forward", "restrict", "subnet", "dhcp_start"),
    "network": ("network",),
    "bridge": ("bridge",),
    "tap": ("ifname", "script", "downscript"),
}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
# The kernel's rule for names of interfaces (dev_valid_name), and no comma or space for QEMU.
_INTERFACE = re.compile(r"(?!\.{1,2}$)[^\s/:,]{1,15}", re.ASCII)


def read_net(table: Table) -> NetSpec:
    """Read one interface. Raises: UsageError, naming what is wrong."""
    net = NetSpec(
        kind=table.one_of("kind", NET_KINDS, "user"),
        mac=table.take("mac", str, required=True).lower(),
        forward=tuple(read_forward(text) for text in table.texts("forward")),
        address=table.take("address", str, DHCP),
        gateway=table.take("gateway", str),
        dns=table.texts("dns"),
        model=table.one_of("model", NIC_MODELS, "virtio"),
        network=table.take("network", str),
        bridge=table.take("bridge", str),
        restrict=table.take("restrict", bool, False),
        subnet=table.take("subnet", str),
        dhcp_start=table.take("dhcp_start", str),
        ifname=table.take("ifname", str),
        script=table.take("script", str),
        downscript=table.take("downscript", str),
    )
    table.end()
    check_net_keys(net, table.where)
    return net


def net_values(net: NetSpec) -> dict[str, Any]:
    """The keys as they are written, also those that say nothing: what it joins comes first."""
    first = ("kind", "network", "bridge", "ifname")
    values = {key: getattr(net, key) for key in first} | {
        key: value for key, value in vars(net).items() if key not in first
    }
    return values | {
        "forward": [str(forward) for forward in net.forward],
        "dns": list(net.dns),
        "model": None if net.model == NIC_MODELS[0] else net.model,
    }


def check_net_keys(net: NetSpec, where: str) -> None:
    """Refuse keys of another kind, and values that no interface can have. Raises: UsageError."""
    for kind, keys in KEYS.items():
        for key in keys:
            if kind != net.kind and getattr(net, key):
                raise UsageError(
                    f"{where}: '{key}' goes with the kind '{kind}', and this interface is of kind "
                    f"'{net.kind}'",
                    field=key,
                )
    needed = KEYS[net.kind][0]
    if net.kind != "user" and not getattr(net, needed):
        raise UsageError(f"{where}: the kind '{net.kind}' needs '{needed}'", field=needed)
    if not _MAC.fullmatch(net.mac) or int(net.mac[:2], 16) & 1:
        raise UsageError(
            f"{where}: '{net.mac[:80]}' is no MAC address of one interface",
            hint="such as 52:54:00:12:34:56",
            field="mac",
        )
    for key in ("bridge", "ifname"):
        name = getattr(net, key)
        if name is not None and not _INTERFACE.fullmatch(name):
            raise UsageError(
                f"{where}: '{name[:80]}' can't be the name of an interface: at most 15 "
                "characters, without '/', ':' and spaces",
                field=key,
            )
    for key in ("script", "downscript"):
        path = getattr(net, key)
        if path is not None and not path.startswith("/"):
            raise UsageError(
                f"{where}: '{key}' is '{path[:80]}', and should begin with '/'", field=key
            )
    if net.kind == "user":
        _check_user(net, where)


def _check_user(net: NetSpec, where: str) -> None:
    try:
        addresses = user_net(net)
    except UsageError as error:
        raise UsageError(f"{where}: {error}", hint=error.hint, field=error.field) from error
    for forward in net.forward:
        if forward.guest_address and not addresses.has(forward.guest_address):
            raise UsageError(
                f"{where}: the forward '{forward}' leads to {forward.guest_address}, which is not "
                f"in the guest's network {addresses.network}",
                field="forward",
            )
