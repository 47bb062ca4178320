"""A change taken back: devices, then those who look after them.

Context: root; the guardian, `undo`, or the next command after a guardian was killed. The
caller holds the change's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from functools import partial
from typing import Final

from drivebay.errors import DrivebayError, InUse, StateError
from drivebay.net.hostbridge.change import Change
from drivebay.net.hostbridge.clients import Client, find_clients, keep, move_clients
from drivebay.net.hostbridge.kernel import Entry, Kernel, attribute, redirected
from drivebay.net.hostbridge.managers import Manager, generate, take_again
from drivebay.net.hostbridge.moves import ours, relabelled, renamed, restore
from drivebay.net.hostbridge.state import Before, LinkState, boot_seconds, read_link
from drivebay.net.hostbridge.writers.files import put_back_files
from drivebay.system.processes import boot_id

__all__ = ["take_back", "undo_confirmed"]

_NODAD: Final = 0x02


def take_back(change: Change, why: str) -> None:
    """Restore, and say why where the next command finds it. Raises: StateError."""
    before = change.before()
    written = change.noted().get("written", [])  # by a `confirm` that was broken off
    put_back_files(written)
    if not change.another_boot(before):
        put_back(before, generated=bool(written))
    at = time.strftime("%H:%M:%S")
    change.end(
        f"'{before.uplink.name}' was taken out of the bridge '{before.bridge}' again at {at}: {why}"
    )


def put_back(before: Before, *, generated: bool) -> None:
    """The old state, from whatever state there is; ``generated`` files are made anew, too.

    Raises: StateError.
    """
    bridge, uplink = before.bridge, before.uplink.name
    clients = [Client(**each) for each in before.clients]
    manager = Manager(**before.manager)
    failed: list[str] = []
    with Kernel() as kernel:
        back = partial(restore, kernel, before)
        with contextlib.suppress(StateError):  # whatever fails now is tried again, and counts then
            back()
        for step in (
            *([partial(generate, manager)] if generated else []),
            partial(take_again, manager, uplink, bridge),
            partial(move_clients, bridge, uplink, clients),
            partial(keep, back) if clients or manager.daemon else back,
        ):
            try:
                step()
            except DrivebayError as error:
                failed.append(str(error))
    if failed:
        raise StateError(f"not everything is as it was: {'; '.join(failed)}")


def as_it_is_now(kernel: Kernel, before: Before) -> Before:
    """What the uplink gets back long after: what the bridge has now, and not what it once had.

    Raises: InUse when others are in the bridge.
    """
    bridge, up = ours(kernel, before), before.uplink
    index = kernel.index(up.name)
    if bridge is None or index is None:
        return before
    _nobody_else_in(kernel, before, bridge)
    now = read_link(kernel, before.bridge)
    rules = kernel.rules()
    uplink = dataclasses.replace(
        up,
        index=index,
        mtu=now.mtu,
        addresses=[_for_uplink(each, before) for each in now.addresses],
        routes=[redirected(each, {bridge: index}) for each in now.routes],
    )
    return dataclasses.replace(
        before,
        uplink=uplink,
        vlans=[_vlan_now(kernel, vlan) for vlan in before.vlans],
        rules=[renamed(each, before.bridge, up.name) for each in before.rules],
        other_rules=[each for each in rules if renamed(each, before.bridge, up.name) == each],
        boot=boot_id(),
        taken=boot_seconds(),
        clients=[
            each.on(before.bridge, up.name).to_json() for each in find_clients(before.bridge)
        ],
    )  # fmt: skip


def undo_confirmed(change: Change, uplink: str) -> None:
    """The files and devices of before a confirmed change.

    Raises: NotFound when there is none; InUse, StateError, HostError.
    """
    before = change.confirmed(uplink)
    with Kernel() as kernel:
        now = as_it_is_now(kernel, before)
    put_back_files(change.written_when_confirmed(uplink))
    put_back(now, generated=True)
    change.forget(uplink)


def _vlan_now(kernel: Kernel, vlan: LinkState) -> LinkState:
    return vlan if kernel.index(vlan.name) is None else read_link(kernel, vlan.name)


def _for_uplink(entry: Entry, before: Before) -> Entry:
    """An address of the bridge as the uplink would have it: the mark that we gave it goes."""
    marked = {
        attribute(each, "IFA_ADDRESS")
        for each in before.uplink.addresses
        if (attribute(each, "IFA_FLAGS") or 0) & _NODAD
    }
    moved = relabelled(entry, before.bridge, before.uplink.name)
    if attribute(moved, "IFA_ADDRESS") in marked:
        return moved
    attrs = [
        [key, value & ~_NODAD if key == "IFA_FLAGS" else value] for key, value in moved["attrs"]
    ]
    return {**moved, "attrs": attrs}


def _nobody_else_in(kernel: Kernel, before: Before, bridge: int) -> None:
    others = [
        str(attribute(link, "IFLA_IFNAME"))
        for link in kernel.links()
        if attribute(link, "IFLA_MASTER") == bridge
        and attribute(link, "IFLA_IFNAME") != before.uplink.name
    ]
    if others:
        raise InUse(
            f"'{before.bridge}' is used by {', '.join(others)}",
            hint="stop the VMs in it: drivebay vm list",
        )
