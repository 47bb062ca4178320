"""The kernel's links, addresses, routes and rules, as plain values that JSON can hold.

Context: root; netlink through pyroute2, in the network namespace of this process.

An *entry* is one netlink message without its header: ``{field: number, …, "attrs": [[name,
value], …]}``. Everything the kernel has told is kept in it, so that what comes back is what
went away, and nothing here needs to know every kind of route.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from drivebay.errors import HostError

__all__ = ["Entry", "Kernel", "attribute", "attributes", "read_entry", "redirected"]

Entry = dict[str, Any]

# What a kernel says about an entry, and does not take back.
_TOLD_ONLY: Final = {"RTA_CACHEINFO", "UNKNOWN", "IFA_MULTICAST", "IFA_ANYCAST"}
_ADDRESS_FIELDS: Final = ("family", "prefixlen", "flags", "scope")
_ROUTE_FIELDS: Final = (
    "family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type", "flags",
)  # fmt: skip
_RULE_FIELDS: Final = ("family", "dst_len", "src_len", "tos", "table", "action", "flags")
_LOCAL_TABLE: Final = 255
_UNICAST_AND_REFUSING: Final = {1, 6, 7, 8, 9}  # unicast blackhole unreachable prohibit throw
_CLONED: Final = 0x200
# RTNH_F_DEAD, _LINKDOWN, _OFFLOAD, _TRAP…: states, and no wishes; 4 is onlink, 2 pervasive.
_WISHED_FLAGS: Final = 4 | 2
_GONE: Final = {errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO}


def attribute(entry: Mapping[str, Any], name: str) -> Any:
    """The first attribute of that name, or None."""
    return next((value for key, value in entry["attrs"] if key == name), None)


def attributes(link: Any, *names: str) -> Any:
    """An attribute of a link's message that lies in others."""
    for name in names:
        if link is None:
            return None
        link = attribute(link, name)
    return link


def redirected(entry: Entry, new: Mapping[int, int]) -> Entry:
    """The same entry of a route on other devices: ``new`` index of each old one."""
    attrs: list[list[Any]] = []
    for name, value in entry["attrs"]:
        if name in ("RTA_OIF", "RTA_IIF"):
            value = new.get(value, value)
        elif name == "RTA_MULTIPATH":
            value = [{**hop, "oif": new.get(hop["oif"], hop["oif"])} for hop in value]
        attrs.append([name, value])
    return {**entry, "attrs": attrs}


def read_entry(message: Mapping[str, Any], fields: Iterable[str]) -> Entry:
    """Make an entry of a message."""
    entry: Entry = {field: message[field] for field in fields}
    entry["attrs"] = [
        [name, _plain(value)] for name, value in message["attrs"] if name not in _TOLD_ONLY
    ]
    return entry


def _plain(value: Any) -> Any:
    """A value of a message without what only netlink's encoding is about."""
    if isinstance(value, Mapping):
        kept = {
            key: _plain(each)
            for key, each in value.items()
            if key not in ("header", "value", "attrs")
        }
        if "attrs" in value:
            kept["attrs"] = [
                [pair[0], _plain(pair[1])] for pair in value["attrs"] if pair[0] not in _TOLD_ONLY
            ]
        return kept
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _packed(value: Any) -> Any:
    """What pyroute2 encodes: pairs of attributes are tuples there."""
    if isinstance(value, Mapping):
        packed = {key: _packed(each) for key, each in value.items() if key != "attrs"}
        if "attrs" in value:
            packed["attrs"] = [
                # pyroute2 takes this number for a string of bytes.
                (name, each.to_bytes(4, sys.byteorder) if name == "RTA_EXPIRES" else _packed(each))
                for name, each in value["attrs"]
            ]
        return packed
    if isinstance(value, list):
        return [_packed(each) for each in value]
    return value


class Kernel:
    """One netlink socket. What is there already is not added, what is gone not removed."""

    def __init__(self) -> None:
        from pyroute2 import IPRoute

        self._netlink = IPRoute()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._netlink.close()

    # ---- looking --------------------------------------------------------------------------------

    def links(self) -> list[dict[str, Any]]:
        return list(self._netlink.get_links())

    def link(self, name: str) -> dict[str, Any] | None:
        return next((each for each in self.links() if attribute(each, "IFLA_IFNAME") == name), None)

    def index(self, name: str) -> int | None:
        found = self._netlink.link_lookup(ifname=name)
        return int(found[0]) if found else None

    def addresses(self, index: int) -> list[Entry]:
        """In the kernel's order: the first of a network is the one that it prefers."""
        return [
            read_entry(each, _ADDRESS_FIELDS)
            for each in self._netlink.get_addr()
            if each["index"] == index
        ]

    def routes(self, index: int) -> list[Entry]:
        """All tables' routes out of a device, but for those that the kernel makes for addresses."""
        found = []
        for family in (2, 10):
            for each in self._netlink.get_routes(family=family):
                table = attribute(each, "RTA_TABLE") or each["table"]
                if (
                    table != _LOCAL_TABLE
                    and each["type"] in _UNICAST_AND_REFUSING
                    and not each["flags"] & _CLONED
                    and index in _devices(each)
                ):
                    found.append(_wished(read_entry(each, _ROUTE_FIELDS), each))
        return found

    def rules(self) -> list[Entry]:
        """All rules of IPv4 and IPv6."""
        found = []
        for family in (2, 10):
            for each in self._netlink.get_rules(family=family):
                entry = read_entry(each, _RULE_FIELDS)
                if attribute(entry, "FRA_PRIORITY") is None:  # a rule without one would get another
                    entry["attrs"].append(["FRA_PRIORITY", 0])
                found.append(entry)
        return found

    # ---- changing -------------------------------------------------------------------------------

    def make_link(self, name: str, **settings: Any) -> None:
        """Raises: HostError, also when the name is taken."""
        self._try(
            f"can't make '{name}'", lambda: self._netlink.link("add", ifname=name, **settings)
        )

    def set_link(self, index: int, what: str, **settings: Any) -> None:
        self._try(f"can't {what}", lambda: self._netlink.link("set", index=index, **settings))

    def delete_link(self, index: int) -> None:
        self._try(
            "can't remove a device", lambda: self._netlink.link("del", index=index), known=_GONE
        )

    def add_address(self, entry: Entry, index: int) -> None:
        self._send("RTM_NEWADDR", {**entry, "index": index}, "put an address there")

    def remove_address(self, entry: Entry, index: int) -> None:
        self._send("RTM_DELADDR", {**entry, "index": index}, "take an address away")

    def add_route(self, entry: Entry) -> None:
        self._send("RTM_NEWROUTE", entry, "add a route")

    def remove_route(self, entry: Entry) -> None:
        self._send("RTM_DELROUTE", entry, "remove a route")

    def add_rule(self, entry: Entry) -> None:
        self._send("RTM_NEWRULE", entry, "add a rule")

    def remove_rule(self, entry: Entry) -> None:
        self._send("RTM_DELRULE", entry, "remove a rule")

    def _send(self, kind: str, entry: Entry, what: str) -> None:
        from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, rtnl

        number = getattr(rtnl, kind)
        message = self._netlink.marshal.msg_map[number]()
        message.update(_packed(entry))
        flags, known = NLM_F_REQUEST | NLM_F_ACK, _GONE
        if kind.startswith("RTM_NEW"):
            flags, known = flags | NLM_F_CREATE | NLM_F_EXCL, {errno.EEXIST}
        message["header"].update({"type": number, "flags": flags})
        self._try(
            f"can't {what} ({_short(entry)})",
            lambda: self._netlink.nlm_request_batch([message]),
            known=known,
        )

    def _try(self, what: str, request: Any, known: Iterable[int] = ()) -> None:
        from pyroute2 import NetlinkError

        try:
            request()
        except NetlinkError as error:
            if error.code not in known:
                raise HostError(what, error.code) from error
        except (TypeError, ValueError, LookupError, AttributeError, struct.error) as error:
            # Of an attribute that pyroute2 reads and can't write; the others are not to wait.
            raise HostError(f"{what}: {error}", errno.EINVAL) from error


def _devices(message: Mapping[str, Any]) -> set[int]:
    hops = attribute(message, "RTA_MULTIPATH") or []
    return {attribute(message, "RTA_OIF"), *(hop["oif"] for hop in hops)}


def _wished(entry: Entry, message: Mapping[str, Any]) -> Entry:
    """A route as one would ask for it: without its present state, with its end if it has one."""
    entry["flags"] &= _WISHED_FLAGS
    for name, value in entry["attrs"]:
        if name == "RTA_MULTIPATH":
            for hop in value:
                hop["flags"] &= _WISHED_FLAGS
    left = (attribute(message, "RTA_CACHEINFO") or {}).get("rta_expires", 0)
    if left > 0 and message["family"] == 10:
        entry["attrs"].append(["RTA_EXPIRES", max(1, left // 100)])  # from clock ticks
    return entry


def _short(entry: Entry) -> str:
    """What to call an entry in an error."""
    names = ("IFA_LOCAL", "IFA_ADDRESS", "RTA_DST", "FRA_PRIORITY", "RTA_GATEWAY")
    shown = [str(attribute(entry, name)) for name in names if attribute(entry, name) is not None]
    return " ".join(shown) or "default"
