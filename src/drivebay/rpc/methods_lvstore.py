"""Methods about stores of logical volumes: made on a bdev, listed, renamed, grown, deleted."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import DrivebayError, NotFound, UsageError
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    Choice,
    ErrorStyle,
    Integer,
    Param,
    Params,
    String,
    method,
    rpc_error_of,
)

if TYPE_CHECKING:
    from drivebay.bdev.lvol.store import Store
    from drivebay.target.target import Target

# What SPDK finds out when the metadata is at work it answers with another code.
_LATE: Final = ErrorStyle(INTERNAL_ERROR, "spdk_json_decode_object failed", INVALID_PARAMS)
_CLEAR: Final = {"none": 1, "unmap": 2, "write_zeroes": 3}  # as in SPDK's volumes on disk

STORE_PARAMS: Final = (
    Param("uuid", String(), doc="of the store"),
    Param("lvs_name", String(), doc="of the store; this or the uuid"),
)


@contextlib.contextmanager
def late_errors(*early: int) -> Iterator[None]:
    """Refuse with "invalid params" and the error's own text, except for the ``early`` ones."""
    try:
        yield
    except DrivebayError as error:
        if error.errno in early:
            raise
        raise rpc_error_of(_LATE, error) from error


def clear_method(word: str | None, default: int) -> int:
    """SPDK's number for a word."""
    return default if word is None else _CLEAR.get(word, 0)


def find_store(target: Target, uuid: str | None, name: str | None) -> Store:
    """The store that a call means. Raises: UsageError, NotFound."""
    if (uuid is None) == (name is None):
        raise UsageError("name one store, by its uuid or by its name", field="lvs_name")
    store = target.stores.find(name, uuid)
    if store is None:
        wanted = str(name if uuid is None else uuid)
        raise NotFound(
            f"there is no store '{wanted[:80]}'", hint="list them with bdev_lvol_get_lvstores"
        )
    return store


def stores_meant(target: Target, uuid: str | None, name: str | None) -> list[Store]:
    """That one, or all of them. Raises: UsageError, NotFound."""
    if uuid is None and name is None:
        return list(target.stores)
    return [find_store(target, uuid, name)]


@method(
    "bdev_lvol_create_lvstore",
    RUNTIME,
    params=(
        Param("bdev_name", String(), required=True, doc="what it is made on; its content is lost"),
        Param("lvs_name", String(), required=True, doc="its name"),
        Param("cluster_sz", Integer(32), default=0, doc="bytes; 4 MiB without it"),
        Param(
            "clear_method",
            Choice("none", "unmap", "write_zeroes"),
            doc="what becomes of the old content; unmap without it",
        ),
        Param(
            "num_md_pages_per_cluster_ratio",
            Integer(32),
            default=0,
            doc="metadata pages for 100 clusters; 100 without it",
        ),
        Param("md_page_size", Integer(32), default=0, doc="bytes; 4096 without it"),
    ),
    style=BDEV,
)
async def bdev_lvol_create_lvstore(target: Target, params: Params) -> Any:
    """Make a store of logical volumes on a bdev; answer its uuid."""
    with late_errors(errno.EPERM, errno.EEXIST, errno.ENODEV, errno.EINVAL):
        base = target.registry.get(params["bdev_name"])
        store = await target.stores.create(
            base,
            params["lvs_name"],
            cluster_bytes=params["cluster_sz"],
            pages_percent=params["num_md_pages_per_cluster_ratio"],
            page_bytes=params["md_page_size"],
            clear_method=clear_method(params["clear_method"], _CLEAR["unmap"]),
        )
    return str(store.uuid)


@method(
    "bdev_lvol_delete_lvstore",
    RUNTIME,
    params=STORE_PARAMS,
    style=BDEV,
    takes_object=True,
)
async def bdev_lvol_delete_lvstore(target: Target, params: Params) -> Any:
    """Delete a store with all its volumes."""
    store = find_store(target, params["uuid"], params["lvs_name"])
    with late_errors():
        await target.stores.destroy(store)
    return True


@method(
    "bdev_lvol_rename_lvstore",
    RUNTIME,
    params=(
        Param("old_name", String(), required=True, doc="the store"),
        Param("new_name", String(), required=True, doc="what it is called from now on"),
    ),
    style=BDEV,
)
async def bdev_lvol_rename_lvstore(target: Target, params: Params) -> Any:
    """Give a store, and the aliases of its volumes, another name."""
    name = params["old_name"]
    store = target.stores.find(name)
    if store is None:
        hint = {"hint": "list them with bdev_lvol_get_lvstores"}
        raise RpcError(-errno.ENOENT, f"Lvol store {name[:80]} not found", hint)
    with late_errors():
        await target.stores.rename(store, params["new_name"])
    return True


@method(
    "bdev_lvol_grow_lvstore",
    RUNTIME,
    params=STORE_PARAMS,
    style=BDEV,
    takes_object=True,
)
async def bdev_lvol_grow_lvstore(target: Target, params: Params) -> Any:
    """Let a store use what its bdev has grown by."""
    store = find_store(target, params["uuid"], params["lvs_name"])
    with late_errors():
        await store.grow()
    return True


@method("bdev_lvol_get_lvstores", RUNTIME, params=STORE_PARAMS, style=BDEV)
async def bdev_lvol_get_lvstores(target: Target, params: Params) -> Any:
    """Show one store, or all."""
    return [
        {
            "uuid": str(store.uuid),
            "name": store.name,
            "base_bdev": store.base.name,
            "total_data_clusters": store.total_data_clusters,
            "free_clusters": store.free_clusters,
            "block_size": store.block_size,
            "cluster_size": store.cluster_bytes,
            "max_growable_size": store.max_growable,
        }
        for store in stores_meant(target, params["uuid"], params["lvs_name"])
    ]
