"""The target and its pools: does it run, does it answer, is there room?

Context: a short-lived process that reaches the target through rpc.client only.
"""

from __future__ import annotations

from collections.abc import Iterator

from drivebay.disks.connection import call, connect, find_socket, target_pid
from drivebay.disks.inventory import Inventory, read_inventory
from drivebay.disks.space import space_of
from drivebay.errors import DrivebayError, Unreachable
from drivebay.host.finding import Finding, failed
from drivebay.target.daemon import find_background

__all__ = ["check_storage", "look"]

_ANSWER_SECONDS = 10.0


def look(named: str | None) -> tuple[Inventory | None, list[Finding]]:
    """What the target has, if one answers, and what there is to say of it."""
    path = find_socket(named)
    background = find_background()
    try:
        with connect(named, _ANSWER_SECONDS) as client:
            version = call(client, "spdk_get_version")["version"]
            inventory = read_inventory(client)
        what = f"process {target_pid(path)} answers at '{path}': {version}"
        return inventory, [Finding("ok", "target", what)]
    except Unreachable as error:
        if background is not None and path == background.rpc_socket:
            return None, [
                Finding(
                    "problem",
                    "target",
                    f"process {background.pid} runs, and does not answer: {error}",
                    "drivebay target status --bundle FILE; drivebay target stop --force",
                )
            ]
        what = f"none runs at '{path}'; a VM that needs one starts it"
        return None, [Finding("note", "target", what, "drivebay target start")]
    except DrivebayError as error:
        return None, [failed("target", error)]


def check_storage(named: str | None) -> Iterator[Finding]:
    """Check the target, and how full its pools are."""
    inventory, findings = look(named)
    yield from findings
    if inventory is None:
        return
    for pool in inventory.pools:
        warning = space_of(inventory, pool).warning(pool)
        if warning is None:
            yield Finding("ok", "pools", f"pool '{pool.name}' has room")
        else:
            size = "" if pool.place is None else " --size SIZE"
            yield Finding("warning", "pools", warning, f"drivebay pool grow {pool.name}{size}")
