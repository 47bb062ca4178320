"""`confirm`: the guardian ends, and then the host's configuration is written.

Context: root, any login; the caller holds the change's lock. If nothing can be written all stays
as it is, unguarded, and `confirm` or `undo` may come again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError, StateError
from drivebay.net.hostbridge import managers
from drivebay.net.hostbridge.change import CONFIRMING, MOVED, MOVING, Change
from drivebay.net.hostbridge.clients import keep
from drivebay.net.hostbridge.kernel import Kernel
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.moves import settle
from drivebay.net.hostbridge.plan import spell_address, spell_route
from drivebay.net.hostbridge.state import Before
from drivebay.net.hostbridge.writers.cloud_init import cloud_init_files
from drivebay.net.hostbridge.writers.files import NewFile, put_back_files, write_files
from drivebay.net.hostbridge.writers.ifupdown import ifupdown_files
from drivebay.net.hostbridge.writers.netplan import netplan_files
from drivebay.net.hostbridge.writers.network_manager import network_manager_files
from drivebay.net.hostbridge.writers.networkd import networkd_files

__all__ = ["Confirmed", "confirm", "files_for"]

ROOT: Final = Path("/")


@dataclass(frozen=True)
class Confirmed:
    """What `confirm` says: whose configuration it was, which files; else what a person writes."""

    manager: str
    files: list[str]
    wanted: str


def confirm(change: Change, before: Before) -> Confirmed:
    """Keep the change. Raises: StateError, HostError; nothing is written then."""
    up = before.uplink.name
    if change.another_boot(before):
        change.end()
        raise StateError(
            "the host has started anew since, and everything is as before",
            hint=f"drivebay net host-bridge apply {up}",
        )
    if change.phase() == MOVING:
        raise StateError(
            "the change was broken off in the middle, and can't be confirmed",
            hint=f"drivebay net host-bridge undo {up}",
        )
    manager = Manager(**before.manager)
    put_back_files(change.noted().get("written", []))  # of a `confirm` that was broken off
    files = files_for(before, manager, ROOT)
    change.end_guardian()
    change.note(phase=CONFIRMING, written=[])
    try:
        _write(change, before, manager, files)
    except DrivebayError:
        change.note(phase=MOVED)
        raise
    change.keep(up)
    return Confirmed(manager.name, [str(file.path) for file in files], wanted(before))


def files_for(before: Before, manager: Manager, root: Path) -> list[NewFile]:
    """The host's configuration as it should be. Raises: StateError."""
    if manager.name == managers.NETPLAN:
        files = netplan_files(before, manager, root)
    elif manager.name == managers.NETWORKD:
        files = networkd_files(before, manager, root)
    elif manager.name == managers.NETWORK_MANAGER:
        files = network_manager_files(before, manager, root)
    elif manager.name == managers.IFUPDOWN:
        files = ifupdown_files(before, root)
    else:
        return []
    return [*files, *cloud_init_files(root)]


def _write(change: Change, before: Before, manager: Manager, files: list[NewFile]) -> None:
    """Write all, and hand the bridge to its daemon; put all back when that does not take it."""
    noted: list[dict[str, object]] = []

    def note(written: list[dict[str, object]]) -> None:
        noted[:] = written
        change.note(written=written)

    write_files(files, note)
    try:
        managers.generate(manager)
    except DrivebayError:
        put_back_files(noted)
        change.note(written=[])
        managers.generate(manager)
        raise
    managers.take_bridge(manager, before.uplink.name, before.bridge)
    if manager.daemon:
        with Kernel() as kernel:
            keep(partial(settle, kernel, before))


def wanted(before: Before) -> str:
    """What a person has to write, when nobody that we know configures the uplink."""
    up = before.uplink
    bridge = f"a bridge '{before.bridge}' with the MAC {up.mac}, without spanning tree"
    parts = [f"{bridge}, with '{up.name}' in it and MTU {up.mtu}; its addresses"]
    parts += [spell_address(each) for each in up.addresses if each["scope"] == 0]
    parts += [f"route {spell_route(each)}" for each in up.routes if each.get("proto") != 2]
    return ", ".join(parts)
