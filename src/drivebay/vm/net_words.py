"""`--net`: an interface in our words and in QEMU's, as one text with commas.

Context: any; looks at no file.

    user[,hostfwd=tcp:[ADDRESS:]PORT-[GUEST]:PORT]…[,restrict][,subnet=CIDR][,dhcpstart=A]
    NAME, or network=NAME              a named network
    bridge=br0                         a bridge that others made
    tap,ifname=tap1[,script=FILE|no][,downscript=FILE|no]
    none                               no interface
    and with each: model=virtio|e1000, mac=, address=CIDR|dhcp, gateway=, dns=

The interfaces have no MAC address yet unless one was named: `nets` chooses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.vm.net_file import check_net_keys
from drivebay.vm.spec import NIC_MODELS, Forward, NetSpec, read_forward

__all__ = ["NO_NET", "read_hostfwd", "read_net_words", "read_nets"]

NO_NET: Final = "none"

# Ours first, then QEMU's; each with its key of NetSpec.
_OF_ALL: Final = {
    "model": "model", "mac": "mac", "address": "address", "gateway": "gateway", "dns": "dns",
}  # fmt: skip
_OF_KIND: Final = {
    "user": {
        "forward": "forward", "hostfwd": "forward",
        "restrict": "restrict",
        "subnet": "subnet", "net": "subnet",
        "dhcpstart": "dhcp_start",
    },
    "network": {"network": "network"},
    "bridge": {"bridge": "bridge", "br": "bridge"},
    "tap": {"ifname": "ifname", "script": "script", "downscript": "downscript"},
}  # fmt: skip
_SWITCH: Final = {"": True, "on": True, "yes": True, "y": True, "off": False, "no": False,
                  "n": False}  # fmt: skip
_SOME_MAC: Final = "52:54:00:00:00:00"
_HOSTFWD = re.compile(
    r"(?P<protocol>[^:]*):(?P<host>[^:]*):(?P<host_port>\d+)-(?P<guest>[^:]*):(?P<guest_port>\d+)",
    re.ASCII,
)


def read_nets(texts: Sequence[str] | None) -> tuple[NetSpec, ...]:
    """All interfaces that were asked for; QEMU's own network if nobody said anything.

    Raises: UsageError.
    """
    if texts is None:
        return (NetSpec("user", ""),)
    if NO_NET in texts:
        if len(texts) > 1:
            raise UsageError(f"--net {NO_NET} goes with no other --net")
        return ()
    return tuple(read_net_words(text) for text in texts)


def read_net_words(text: str) -> NetSpec:
    """Read one interface. Raises: UsageError."""
    where = f"--net '{text[:80]}'"
    first, *words = text.split(",")
    kind, equals, _ = first.partition("=")
    if equals and kind in ("network", "bridge"):
        words = [first, *words]
    elif equals or not kind:
        raise UsageError(
            f"{where} should begin with what the interface joins",
            hint="user, the name of a network, bridge=br0 or tap,ifname=tap1; or 'none'",
        )
    elif kind not in ("user", "tap", "bridge"):
        kind, words = "network", [f"network={first}", *words]
    values: dict[str, Any] = {"mac": ""}
    for word in words:
        _add_word(values, kind, word, where)
    net = NetSpec(kind=kind, **values)
    check_net_keys(net if net.mac else replace(net, mac=_SOME_MAC), where)
    return net


def _add_word(values: dict[str, Any], kind: str, word: str, where: str) -> None:
    name, equals, value = word.partition("=")
    key = (_OF_KIND[kind] | _OF_ALL).get(name)
    if key is None:
        raise _unknown(kind, name, where)
    if key == "restrict" and (value in _SWITCH and bool(value) == bool(equals)):
        values[key] = _SWITCH[value]
        return
    if key == "restrict":
        raise UsageError(f"{where}: restrict is on or off, not '{value[:40]}'")
    if not value:
        raise UsageError(f"{where}: '{name}' has no value", hint=f"write {name}=…")
    if key in values and values[key] and key not in ("forward", "dns"):
        raise UsageError(f"{where}: '{name}' is said twice")
    match name:
        case "hostfwd":
            values[key] = (*values.get(key, ()), read_hostfwd(value))
        case "forward":
            values[key] = (*values.get(key, ()), read_forward(value))
        case "dns":
            values[key] = (*values.get(key, ()), value)
        case "script" | "downscript":
            values[key] = None if value == "no" else str(Path(value).absolute())
        case "model" if value not in NIC_MODELS:
            raise UsageError(
                f"{where}: there is no model '{value[:40]}'", hint=", ".join(NIC_MODELS)
            )
        case "mac":
            values[key] = value.lower()
        case _:
            values[key] = value


def _unknown(kind: str, name: str, where: str) -> UsageError:
    for other, words in _OF_KIND.items():
        if name in words:
            return UsageError(f"{where}: '{name}' goes with {other}, and not with {kind}")
    known = [*_OF_KIND[kind], *_OF_ALL]
    near = difflib.get_close_matches(name, known, 1)
    return UsageError(
        f"{where}: '{name[:40]}' is not understood",
        hint=f"is '{near[0]}' meant?" if near else f"known are {', '.join(known)}",
    )


def read_hostfwd(text: str) -> Forward:
    """Read a forward as QEMU spells it; without an address of the host it is 127.0.0.1.

    Raises: UsageError.

    >>> str(read_hostfwd("tcp::2222-:22"))
    '127.0.0.1:2222:22'
    """
    found = _HOSTFWD.fullmatch(text)
    if found is None or found["protocol"] not in ("", "tcp", "udp"):
        six = ": QEMU's own network forwards IPv4 only here" if "[" in text else ""
        raise UsageError(
            f"hostfwd '{text[:80]}' is no port forward{six}",
            hint="write hostfwd=tcp:127.0.0.1:2222-:22, or --forward 2222:22",
        )
    words = [found["protocol"] or "tcp", found["host"], found["host_port"],
             found["guest"], found["guest_port"]]  # fmt: skip
    return read_forward(":".join(filter(None, words)))
