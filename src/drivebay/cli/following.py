"""How far a target is with work that takes long: a bar on a terminal, nothing without one.

Some methods answer when they have copied everything, others at once, and go on meanwhile.
Context: a short-lived process. Whoever ends it ends the looking, not the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from drivebay.cli.progress import Progress, watch
from drivebay.disks.connection import RpcRefused, call, connect
from drivebay.errors import StateError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["call_to_the_end", "follow", "lvol_of"]

# A copy of a large disk takes hours; the answer comes when it is done.
_COPY_LIMIT_S: Final = 7 * 24 * 3600.0
_EVERY_S: Final = 0.2

_Look = Callable[[], tuple[int, int]]


def call_to_the_end(client: Client, socket: str | None, method: str, params: Any = None) -> Any:
    """Call a method and return its result, with a bar if it is one that copies first.

    Raises: as call().
    """
    if method not in _COPYING:
        return call(client, method, params)
    results: list[Any] = []
    with connect(socket, _COPY_LIMIT_S) as worker:
        look = _look_of(client, method, params)
        if look is None:
            return call(worker, method, params)
        name = params["name"]
        watch(f"copying {name}", lambda: results.append(call(worker, method, params)), look)
    return results[0]


def _look_of(client: Client, method: str, params: Any) -> _Look | None:
    """How to see how far a copy is; None when nobody would, or when the call will be refused."""
    name = params.get("name") if isinstance(params, dict) else None
    if not sys.stderr.isatty() or not isinstance(name, str):
        return None
    try:
        return _COPYING[method](client, name)
    except RpcRefused:  # the call itself says better what is wrong
        return None


def follow(client: Client, method: str, params: Any, result: Any) -> None:
    """Show a bar for what a method began, until that is over. Raises: StateError if it failed."""
    if not sys.stderr.isatty():
        return
    if method == "bdev_lvol_start_shallow_copy":
        _follow_copy(client, result["operation_id"])
    elif method == "bdev_raid_add_base_bdev":
        _follow_rebuild(client, params["raid_bdev"])


def lvol_of(client: Client, name: str) -> dict[str, Any]:
    """What the target says about a volume."""
    specific: dict[str, Any] = _bdev(client, name)["driver_specific"]["lvol"]
    return specific


def _bdev(client: Client, name: str) -> dict[str, Any]:
    found: dict[str, Any] = call(client, "bdev_get_bdevs", {"name": name})[0]
    return found


def _look_of_inflate(client: Client, name: str) -> _Look:
    bdev = _bdev(client, name)
    lvol = bdev["driver_specific"]["lvol"]
    [store] = call(client, "bdev_lvol_get_lvstores", {"uuid": lvol["lvol_store_uuid"]})
    clusters = bdev["num_blocks"] * bdev["block_size"] // store["cluster_size"]
    return _look_of_clusters(client, name, lvol, clusters - lvol["num_allocated_clusters"])


def _look_of_decouple(client: Client, name: str) -> _Look:
    bdev = _bdev(client, name)
    lvol = bdev["driver_specific"]["lvol"]
    below = 0
    if "base_snapshot" in lvol:
        pool = bdev["aliases"][0].partition("/")[0]
        below = lvol_of(client, f"{pool}/{lvol['base_snapshot']}")["num_allocated_clusters"]
    return _look_of_clusters(client, name, lvol, below)


def _look_of_clusters(client: Client, name: str, lvol: dict[str, Any], missing: int) -> _Look:
    """How many of those that are missing now the volume has by then."""
    had = lvol["num_allocated_clusters"]
    return lambda: (lvol_of(client, name)["num_allocated_clusters"] - had, missing)


_COPYING: Final = {
    "bdev_lvol_inflate": _look_of_inflate,
    "bdev_lvol_decouple_parent": _look_of_decouple,
}


def _follow_copy(client: Client, number: int) -> None:
    with Progress("copying") as bar:
        while True:
            state = call(client, "bdev_lvol_check_shallow_copy", {"operation_id": number})
            if state["state"] != "in progress":
                break
            bar.update(state["copied_clusters"], state["total_clusters"])
            time.sleep(_EVERY_S)
    if state["state"] == "error":
        raise StateError(
            f"the copy ended after {state['copied_clusters']} of {state['total_clusters']} "
            f"clusters: {state['error']}"
        )


def _follow_rebuild(client: Client, raid: str) -> None:
    with Progress(f"rebuilding {raid}") as bar:
        while (percent := _rebuilt_percent(client, raid)) is not None:
            bar.update(percent, 100)
            time.sleep(_EVERY_S)


def _rebuilt_percent(client: Client, raid: str) -> int | None:
    for array in call(client, "bdev_raid_get_bdevs", {"category": "all"}):
        if array["name"] == raid and "process" in array:
            return int(array["process"]["progress"]["percent"])
    return None
