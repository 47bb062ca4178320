"""Methods about logical volumes: made, snapshotted, cloned, changed, deleted, listed, copied."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.in_slices import in_slices
from drivebay.errors import InUse, NotFound
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from drivebay.rpc.methods_lvstore import (
    STORE_PARAMS,
    clear_method,
    find_store,
    late_errors,
    stores_meant,
)
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
)
from drivebay.rpc.schema import Boolean as Bool

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.lvol.volume import Volume
    from drivebay.target.target import Target

_MIB = 1 << 20
_SHOWN_AT_ONCE: Final = 100  # then the loop's other work has a turn
_NAME = Param("name", String(), required=True, doc="the volume")
# Deleting refuses with a code of its own.
_DELETE = ErrorStyle(INTERNAL_ERROR, "spdk_json_decode_object failed", INTERNAL_ERROR)


def _size(mebibytes: int) -> int:
    """In bytes. SPDK's own arithmetic would go round at 64 bits."""
    return mebibytes * _MIB


@method(
    "bdev_lvol_create",
    RUNTIME,
    params=(
        Param("lvol_name", String(), required=True, doc="its name within the store"),
        Param("size_in_mib", Integer(64), required=True, doc="rounded up to whole clusters"),
        Param("thin_provision", Bool(), default=False, doc="take clusters when they are written"),
        *STORE_PARAMS,
        Param(
            "clear_method",
            Choice("default", "none", "unmap", "write_zeroes"),
            doc="what becomes of its clusters when it is deleted",
        ),
    ),
    style=BDEV,
)
async def bdev_lvol_create(target: Target, params: Params) -> Any:
    """Make a volume in a store; answer the name of its bdev."""
    store = find_store(target, params["uuid"], params["lvs_name"])
    with late_errors(errno.EEXIST, errno.EINVAL):
        volume = await store.create_volume(
            params["lvol_name"],
            _size(params["size_in_mib"]),
            thin=params["thin_provision"],
            clear_method=clear_method(params["clear_method"], 0),
        )
    return volume.unique_id


@method(
    "bdev_lvol_snapshot",
    RUNTIME,
    params=(
        Param("lvol_name", String(), required=True, doc="the volume"),
        Param("snapshot_name", String(), required=True, doc="the snapshot's name in the store"),
    ),
    style=BDEV,
)
async def bdev_lvol_snapshot(target: Target, params: Params) -> Any:
    """Keep a volume's content as it is now, in a read-only volume; answer its bdev's name."""
    volume = target.stores.volume(params["lvol_name"])
    with late_errors():
        snapshot = await volume.store.snapshot(volume, params["snapshot_name"])
    return snapshot.unique_id


@method(
    "bdev_lvol_clone",
    RUNTIME,
    params=(
        Param("snapshot_name", String(), required=True, doc="the snapshot"),
        Param("clone_name", String(), required=True, doc="the clone's name in the store"),
    ),
    style=BDEV,
)
async def bdev_lvol_clone(target: Target, params: Params) -> Any:
    """Make a volume that begins as a snapshot; answer its bdev's name."""
    snapshot = target.stores.volume(params["snapshot_name"])
    with late_errors():
        clone = await snapshot.store.clone(snapshot, params["clone_name"])
    return clone.unique_id


@method(
    "bdev_lvol_clone_bdev",
    RUNTIME,
    params=(
        Param("bdev", String(), required=True, doc="what it begins as; read-only from now on"),
        Param("lvs_name", String(), required=True, doc="the store"),
        Param("clone_name", String(), required=True, doc="the clone's name in the store"),
    ),
    style=BDEV,
)
async def bdev_lvol_clone_bdev(target: Target, params: Params) -> Any:
    """Make a volume that begins as another bdev; answer its bdev's name."""
    store = target.stores.find(params["lvs_name"])
    if store is None:
        raise RpcError(INVALID_PARAMS, "lvs does not exist")
    try:
        external = target.registry.get(params["bdev"])
    except NotFound as error:
        raise RpcError(INVALID_PARAMS, "bdev does not exist", {"hint": error.hint}) from error
    if any(volume.bdev is external for volume in store.volumes):
        raise RpcError(
            INVALID_PARAMS,
            "bdev is an lvol in same lvs as clone; use bdev_lvol_clone instead",
        )
    with late_errors():
        clone = await store.clone_bdev(external, params["clone_name"])
    return clone.unique_id


@method("bdev_lvol_inflate", RUNTIME, params=(_NAME,), style=BDEV)
async def bdev_lvol_inflate(target: Target, params: Params) -> Any:
    """Give a volume all its clusters, and no parent; goes on when the client hangs up."""
    volume = target.stores.volume(params["name"])
    with late_errors():
        await volume.store.inflate(volume)
    return True


@method("bdev_lvol_decouple_parent", RUNTIME, params=(_NAME,), style=BDEV)
async def bdev_lvol_decouple_parent(target: Target, params: Params) -> Any:
    """Copy to a volume what its parent has and it has not; then it has no such parent."""
    volume = target.stores.volume(params["name"])
    with late_errors():
        await volume.store.decouple(volume)
    return True


@method(
    "bdev_lvol_resize",
    RUNTIME,
    params=(
        _NAME,
        Param("size_in_mib", Integer(64), required=True, doc="rounded up to whole clusters"),
        Param("force", Bool(), default=False, doc="ours: shrink also what is in use"),
    ),
    style=BDEV,
)
async def bdev_lvol_resize(target: Target, params: Params) -> Any:
    """Make a volume larger or smaller; a guest sees it."""
    volume = target.stores.volume(params["name"])
    size = _size(params["size_in_mib"])
    if size < volume.size and not params["force"] and _in_use(target, volume.bdev):
        raise InUse(
            f"volume '{volume.alias}' is in use and can't shrink to {params['size_in_mib']} MiB",
            hint='disconnect its users, or add "force": true; what is beyond is lost',
        )
    with late_errors():
        await volume.store.resize(volume, size, force=params["force"])
    return True


def _in_use(target: Target, bdev: Bdev | None) -> bool:
    return bdev is not None and bool(target.registry.channels(bdev))


@method(
    "bdev_lvol_rename",
    RUNTIME,
    params=(
        Param("old_name", String(), required=True, doc="the volume, as alias or by its uuid"),
        Param("new_name", String(), required=True, doc="its new name within the store"),
    ),
    style=BDEV,
)
async def bdev_lvol_rename(target: Target, params: Params) -> Any:
    """Give a volume another name."""
    volume = target.stores.volume(params["old_name"])
    with late_errors():
        await volume.store.rename(volume, params["new_name"])
    return True


@method("bdev_lvol_set_read_only", RUNTIME, params=(_NAME,), style=BDEV)
async def bdev_lvol_set_read_only(target: Target, params: Params) -> Any:
    """Let a volume's content never change again."""
    volume = target.stores.volume(params["name"])
    with late_errors():
        await volume.store.set_read_only(volume)
    return True


@method(
    "bdev_lvol_set_parent",
    RUNTIME,
    params=(
        Param("lvol_name", String(), required=True, doc="the volume"),
        Param("parent_name", String(), required=True, doc="a snapshot of the same store"),
    ),
    style=BDEV,
)
async def bdev_lvol_set_parent(target: Target, params: Params) -> Any:
    """Have a volume read what it has not from another snapshot."""
    volume = target.stores.volume(params["lvol_name"])
    parent = target.stores.volume(params["parent_name"])
    with late_errors():
        await volume.store.set_parent(volume, parent)
    return True


@method(
    "bdev_lvol_set_parent_bdev",
    RUNTIME,
    params=(
        Param("lvol_name", String(), required=True, doc="the volume"),
        Param("parent_name", String(), required=True, doc="any bdev"),
    ),
    style=BDEV,
)
async def bdev_lvol_set_parent_bdev(target: Target, params: Params) -> Any:
    """Have a volume read what it has not from another bdev."""
    volume = target.stores.volume(params["lvol_name"])
    with late_errors():
        parent = target.registry.get(params["parent_name"])
        await volume.store.set_parent_bdev(volume, parent)
    return True


@method("bdev_lvol_delete", RUNTIME, params=(_NAME,), style=_DELETE)
async def bdev_lvol_delete(target: Target, params: Params) -> Any:
    """Delete a volume; one with several clones is refused."""
    try:
        volume = target.stores.volume(params["name"])
    except NotFound as error:
        raise RpcError(-errno.ENODEV, "No such device", {"reason": str(error)}) from error
    await volume.store.delete(volume)
    return True


@method(
    "bdev_lvol_get_lvols",
    RUNTIME,
    params=(
        Param("lvs_uuid", String(), doc="those of this store"),
        Param("lvs_name", String(), doc="the same by its name"),
    ),
    style=BDEV,
)
async def bdev_lvol_get_lvols(target: Target, params: Params) -> Any:
    """Show the volumes of one store, or of all."""
    stores = stores_meant(target, params["lvs_uuid"], params["lvs_name"])
    return [
        _describe(volume)
        for store in stores
        async for volume in in_slices(store.volumes, _SHOWN_AT_ONCE)
        if volume in store
    ]


def _describe(volume: Volume) -> dict[str, Any]:
    return {
        "alias": volume.alias,
        "uuid": str(volume.uuid),
        "name": volume.name,
        "is_thin_provisioned": volume.is_thin,
        "is_snapshot": volume.is_snapshot,
        "is_clone": volume.is_clone,
        "is_esnap_clone": volume.is_esnap_clone,
        "is_degraded": volume.is_degraded,
        "num_allocated_clusters": volume.allocated,
        "lvs": {"name": volume.store.name, "uuid": str(volume.store.uuid)},
    }


@method(
    "bdev_lvol_start_shallow_copy",
    RUNTIME,
    params=(
        Param("src_lvol_name", String(), required=True, doc="a volume that is read-only"),
        Param("dst_bdev_name", String(), required=True, doc="a bdev that is at least as large"),
    ),
    style=BDEV,
)
async def bdev_lvol_start_shallow_copy(target: Target, params: Params) -> Any:
    """Begin to copy a volume's own clusters, not its parents', to the same place of a bdev."""
    volume = target.stores.volume(params["src_lvol_name"])
    with late_errors():
        copy = target.copies.start(volume, target.registry.get(params["dst_bdev_name"]))
    return {"operation_id": copy.number}


@method(
    "bdev_lvol_check_shallow_copy",
    RUNTIME,
    params=(Param("operation_id", Integer(32), required=True, doc="what the start answered"),),
    style=BDEV,
)
async def bdev_lvol_check_shallow_copy(target: Target, params: Params) -> Any:
    """Show how far a copy is; one that has ended is shown once."""
    return target.copies.show(params["operation_id"])
