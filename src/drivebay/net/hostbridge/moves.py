"""The moves themselves, and the way back: each looks at what is, and does what is missing.

Context: root. The bridge is made ready first; then the uplink goes into it and the addresses
and routes follow at once. For these milliseconds frames of open connections are lost and sent
again. The uplink's MAC stays in the neighbours' tables and the switch's port stays the same, so
nobody has to be told.

`restore` is the opposite of every step at once. It compares with before.json and assumes
nothing about how far the moves came, so that it mends what a killed command left as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from drivebay.errors import DrivebayError, HostError, StateError
from drivebay.net.hostbridge.kernel import Entry, Kernel, attribute, redirected
from drivebay.net.hostbridge.state import (
    ADDR_GEN_MODE,
    Before,
    LinkState,
    aged,
    kind_of,
    setting_path,
)

__all__ = ["Move", "move_steps", "restore", "settle"]

Move = tuple[str, Callable[[], object]]

_NO_ADDRESSES: Final = "1"  # addr_gen_mode: none
ACCEPT_DAD: Final = "ipv6/accept_dad"
_NODAD: Final = 0x02
# Wishes: IFA_F_NODAD, _HOMEADDRESS, _MANAGETEMPADDR, _NOPREFIXROUTE, _MCAUTOJOIN.
_WISHED: Final = {2: 0x200 | 0x400, 10: 0x02 | 0x10 | 0x100 | 0x200 | 0x400}
_IPV6: Final = 10


def move_steps(kernel: Kernel, before: Before) -> list[Move]:
    """What is done to the kernel's devices, in order, in words."""
    up, bridge = before.uplink, before.bridge
    what = f"the MAC {up.mac}, MTU {up.mtu}, without spanning tree"
    all_of_it = (
        f"{_count(up.addresses, 'address', 'addresses')} and {_count(up.routes, 'route', 'routes')}"
    )
    steps: list[Move] = [
        (f"make the bridge '{bridge}' with {what}", partial(_make_bridge, kernel, before)),
        (f"put '{up.name}' into '{bridge}'", partial(_enslave, kernel, before)),
        (f"move {all_of_it} to '{bridge}'", partial(_move_addresses, kernel, before)),
    ]
    if before.rules:
        text = f"let {_count(before.rules, 'rule', 'rules')} name '{bridge}', not '{up.name}'"
        steps.append((text, partial(_exchange_rules, kernel, before, up.name, bridge)))
    for vlan in before.vlans:
        text = f"make the VLAN device '{vlan.name}' (VLAN {vlan.vlan}) again on '{bridge}'"
        steps.append((text, partial(_move_vlan, kernel, before, vlan)))
    return steps


def _count(things: list[Entry], one: str, several: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else several}"


# ---- there ------------------------------------------------------------------------------------


def _make_bridge(kernel: Kernel, before: Before) -> None:
    """Ready to take over, and silent until it does."""
    up, name = before.uplink, before.bridge
    kernel.make_link(name, kind="bridge", br_stp_state=0, br_forward_delay=0, address=up.mac)
    index = _needed(kernel, name)
    # Set after it was made, the MTU stays whatever joins the bridge later.
    kernel.set_link(index, f"set the MTU of '{name}'", mtu=up.mtu)
    write_settings(name, {**up.settings, ADDR_GEN_MODE: _NO_ADDRESSES})
    kernel.set_link(index, f"set '{name}' up", state="up")


def _enslave(kernel: Kernel, before: Before) -> None:
    up = before.uplink
    # In the bridge it must not get addresses by itself.
    write_settings(up.name, {"ipv6/accept_ra": "0", ADDR_GEN_MODE: _NO_ADDRESSES})
    bridge = _needed(kernel, before.bridge)
    kernel.set_link(up.index, f"put '{up.name}' into '{before.bridge}'", master=bridge)


def _move_addresses(kernel: Kernel, before: Before) -> None:
    up, bridge = before.uplink, _needed(kernel, before.bridge)
    for entry in up.addresses:
        kernel.add_address(_wish(entry, before, up.name, before.bridge), bridge)
    for entry in up.routes:
        kernel.remove_route(entry)
    for entry in reversed(up.addresses):  # the first of a network would take the others along
        kernel.remove_address(entry, up.index)
    _add_routes(kernel, before, up.routes, {up.index: bridge})
    if ADDR_GEN_MODE in up.settings:
        write_settings(before.bridge, {ADDR_GEN_MODE: up.settings[ADDR_GEN_MODE]})


def _exchange_rules(kernel: Kernel, before: Before, old: str, new: str) -> None:
    for rule in before.rules:
        kernel.add_rule(renamed(rule, before.uplink.name, new))
        kernel.remove_rule(renamed(rule, before.uplink.name, old))


def _move_vlan(kernel: Kernel, before: Before, vlan: LinkState) -> None:
    bridge = _needed(kernel, before.bridge)
    present = kernel.index(vlan.name)
    if present is not None:
        kernel.delete_link(present)
    _make_vlan(kernel, before, vlan, bridge)


def _make_vlan(kernel: Kernel, before: Before, vlan: LinkState, lower: int) -> None:
    """A VLAN device with all that it had."""
    kernel.make_link(vlan.name, **vlan_request(vlan, lower))
    index = _needed(kernel, vlan.name)
    write_settings(vlan.name, {**vlan.settings, ADDR_GEN_MODE: _NO_ADDRESSES})
    if vlan.master:
        kernel.set_link(index, f"put '{vlan.name}' where it was", master=vlan.master)
    if not vlan.up:
        return
    kernel.set_link(index, f"set '{vlan.name}' up", state="up")
    _put_there(kernel, before, vlan, index, vlan.name)
    if ADDR_GEN_MODE in vlan.settings:
        write_settings(vlan.name, {ADDR_GEN_MODE: vlan.settings[ADDR_GEN_MODE]})


def vlan_request(vlan: LinkState, lower: int) -> dict[str, Any]:
    """The request for a VLAN device of the same name, number, MAC and MTU."""
    request = {"kind": "vlan", "link": lower, "vlan_id": vlan.vlan, "address": vlan.mac}
    if vlan.vlan_protocol is not None:
        request["vlan_protocol"] = vlan.vlan_protocol
    return {**request, "mtu": vlan.mtu}


# ---- and back -----------------------------------------------------------------------------------


def restore(kernel: Kernel, before: Before) -> None:
    """Make the devices what before.json says. Harmless when they are.

    It goes on after what fails, since half of an uplink is better than none of it.
    Raises: StateError at the end, which names all that failed.
    """
    failed: list[str] = []
    for step in (_remove_bridge, _restore_uplink, _restore_rules, _restore_vlans):
        try:
            step(kernel, before)
        except DrivebayError as error:
            failed.append(str(error))
    if failed:
        raise StateError(f"not everything is as it was: {'; '.join(failed)}")


def ours(kernel: Kernel, before: Before) -> int | None:
    """The bridge that we made: somebody else's of that name has another MAC."""
    link = kernel.link(before.bridge)
    if link is None or kind_of(link) != "bridge":
        return None
    return link["index"] if attribute(link, "IFLA_ADDRESS") == before.uplink.mac else None


def _remove_bridge(kernel: Kernel, before: Before) -> None:
    up, bridge = before.uplink, ours(kernel, before)
    link = kernel.link(up.name)
    if link is not None and bridge is not None and attribute(link, "IFLA_MASTER") == bridge:
        kernel.set_link(link["index"], f"take '{up.name}' out of '{before.bridge}'", master=0)
    if bridge is None:
        return
    for vlan in before.vlans:  # it would go with the bridge unseen
        found = kernel.link(vlan.name)
        if found is not None and attribute(found, "IFLA_LINK") == bridge:
            kernel.delete_link(found["index"])
    kernel.delete_link(bridge)


def _restore_uplink(kernel: Kernel, before: Before) -> None:
    up = before.uplink
    index = _needed(kernel, up.name)
    settings = {key: value for key, value in up.settings.items() if key != ADDR_GEN_MODE}
    write_settings(up.name, settings)
    kernel.set_link(index, f"set the MTU of '{up.name}'", mtu=up.mtu)
    if up.up:
        kernel.set_link(index, f"set '{up.name}' up", state="up")
    _put_there(kernel, before, up, index, up.name)
    if ADDR_GEN_MODE in up.settings:
        write_settings(up.name, {ADDR_GEN_MODE: up.settings[ADDR_GEN_MODE]})


def _restore_rules(kernel: Kernel, before: Before) -> None:
    _exchange_rules(kernel, before, before.bridge, before.uplink.name)
    for rule in before.other_rules:
        kernel.add_rule(rule)


def _restore_vlans(kernel: Kernel, before: Before) -> None:
    for vlan in before.vlans:
        if kernel.index(vlan.name) is None:
            _make_vlan(kernel, before, vlan, _needed(kernel, before.uplink.name))


def settle(kernel: Kernel, before: Before) -> None:
    """See to it that the bridge has what the uplink had, whatever a DHCP client has done since."""
    bridge, up = _needed(kernel, before.bridge), before.uplink
    # A manager that lets go of a device may set it down.
    kernel.set_link(up.index, f"set '{up.name}' up", state="up")
    _put_there(kernel, before, before.uplink, bridge, before.bridge)
    for rule in before.other_rules:  # a manager that lets go of the uplink takes its own along
        kernel.add_rule(rule)


def _put_there(kernel: Kernel, before: Before, link: LinkState, index: int, name: str) -> None:
    """Give a device the addresses and routes that ``link`` had and that it lacks."""
    there = {_identity(entry) for entry in kernel.addresses(index)}
    # An address that waits until nobody else claims it can't be used for a second.
    write_settings(name, {ACCEPT_DAD: "0"})
    for entry in link.addresses:
        if _identity(entry) not in there:
            kernel.add_address(_wish(entry, before, link.name, name), index)
    _add_routes(kernel, before, link.routes, {link.index: index})
    write_settings(name, {key: link.settings[key] for key in (ACCEPT_DAD,) if key in link.settings})


def _identity(entry: Entry) -> tuple[Any, ...]:
    local = attribute(entry, "IFA_LOCAL") or attribute(entry, "IFA_ADDRESS")
    return entry["family"], local, entry["prefixlen"]


def _add_routes(
    kernel: Kernel, before: Before, routes: list[Entry], devices: dict[int, int]
) -> None:
    for entry in routes:
        kernel.add_route(redirected(aged(entry, before.age()), devices))


def _wish(entry: Entry, before: Before, old: str, new: str) -> Entry:
    """An address as one asks for it, aged meanwhile.

    On the bridge it is not tested for other users of it; who looks at the uplink later does not
    want to see that flag.
    """
    family = entry["family"]
    flags = (attribute(entry, "IFA_FLAGS") or entry["flags"]) & _WISHED[family]
    if family == _IPV6 and new == before.bridge:
        flags |= _NODAD
    wished = relabelled(aged(entry, before.age()), old, new)
    attrs = [[key, flags if key == "IFA_FLAGS" else value] for key, value in wished["attrs"]]
    return {**wished, "flags": flags & 0xFF, "attrs": attrs}


def relabelled(entry: Entry, old: str, new: str) -> Entry:
    """An address whose label names its new device."""
    attrs: list[list[Any]] = []
    for name, value in entry["attrs"]:
        if name == "IFA_LABEL" and (value == old or value.startswith(f"{old}:")):
            value = (new + value[len(old) :])[:15]
        attrs.append([name, value])
    return {**entry, "attrs": attrs}


def renamed(rule: Entry, old: str, new: str) -> Entry:
    """A rule that names another device."""
    names = ("FRA_IIFNAME", "FRA_OIFNAME")
    attrs = [[key, new if key in names and value == old else value] for key, value in rule["attrs"]]
    return {**rule, "attrs": attrs}


def write_settings(device: str, settings: dict[str, str]) -> None:
    """Set what this kernel has and lets us set: a container may have /proc/sys read-only."""
    for setting, value in settings.items():
        path = setting_path(device, setting)
        with contextlib.suppress(OSError):
            if path.read_text().strip() != value:
                path.write_text(value)


def _needed(kernel: Kernel, name: str) -> int:
    index = kernel.index(name)
    if index is None:
        raise HostError(f"the device '{name}' is gone", 19, hint="ip -brief link")
    return index
