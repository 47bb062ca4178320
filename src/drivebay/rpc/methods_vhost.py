"""Methods about vhost controllers and their transport."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import AlreadyExists, HostError, InUse, NotFound
from drivebay.rpc.jsonrpc import RpcError
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    VHOST,
    VHOST_LIST,
    Boolean,
    Integer,
    Param,
    Params,
    String,
    method,
    rpc_error_of,
)
from drivebay.vhost.ring import Coalescing

if TYPE_CHECKING:
    from drivebay.target.target import Target

TRANSPORT: Final = "vhost_user_blk"


@method(
    "vhost_create_blk_controller",
    RUNTIME,
    params=(
        Param("ctrlr", String(), required=True, doc="its name, and its socket's in the -S folder"),
        Param("dev_name", String(), required=True, doc="the bdev: name, alias or uuid"),
        Param("cpumask", String(), doc="the cores whose reactors may serve it"),
        Param("readonly", Boolean(), default=False, doc="guests may not write"),
        Param("packed_ring", Boolean(), default=False, doc="offer packed rings too"),
        Param("transport", String(), doc=f"{TRANSPORT}, the only one"),
        Param(
            "serial",
            String(),
            doc="the serial number that guests see, instead of the bdev's name (ours)",
        ),
        Param("socket_uid", Integer(31), doc="the user who may connect (ours, not SPDK's)"),
    ),
    style=VHOST,
    relaxed=True,
    changes=True,
)
async def vhost_create_blk_controller(target: Target, params: Params) -> Any:
    """Offer a bdev to virtual machines on a vhost-user socket."""
    await target.controllers.create_blk(
        params["ctrlr"],
        params["dev_name"],
        cpumask=params["cpumask"],
        readonly=params["readonly"],
        packed_ring=params["packed_ring"],
        transport=params["transport"],
        socket_uid=params["socket_uid"],
        serial=params["serial"],
    )
    return True


@method(
    "vhost_controller_set_coalescing",
    RUNTIME,
    params=(
        Param("ctrlr", String(), required=True, doc="the controller"),
        Param(
            "delay_base_us",
            Integer(32),
            required=True,
            doc="the delay at twice the threshold; 0: off",
        ),
        Param("iops_threshold", Integer(32), required=True, doc="requests a second of one queue"),
    ),
    style=VHOST,
    changes=True,
)
async def vhost_controller_set_coalescing(target: Target, params: Params) -> Any:
    """Notify guests less often above a rate of requests; running sessions follow at once."""
    wanted = Coalescing(params["delay_base_us"], params["iops_threshold"])
    await target.controllers.set_coalescing(params["ctrlr"], wanted)
    return True


@method(
    "vhost_get_controllers",
    RUNTIME,
    params=(Param("name", String(), doc="one controller; all without it"),),
    style=VHOST_LIST,
)
async def vhost_get_controllers(target: Target, params: Params) -> Any:
    """Show controllers, their sessions and what they serve, in the order of their names."""
    if params["name"] is not None:
        return [target.controllers.get(params["name"]).describe()]
    shown = [controller.describe() for controller in target.controllers]
    return sorted(shown, key=lambda description: str(description["ctrlr"]))


@method(
    "vhost_delete_controller",
    RUNTIME,
    params=(
        Param("ctrlr", String(), required=True, doc="the controller"),
        Param("force", Boolean(), default=False, doc="end its sessions first (ours, not SPDK's)"),
    ),
    style=VHOST,
    changes=True,
)
async def vhost_delete_controller(target: Target, params: Params) -> Any:
    """Remove a controller and its socket; refused while a session is connected."""
    try:
        await target.controllers.delete(params["ctrlr"], force=params["force"])
    except InUse as error:
        refusal = rpc_error_of(BDEV, error)  # -16: SPDK would wait for ever instead
        data = {**(refusal.data or {})}
        data.setdefault("hint", 'disconnect it, or give "force": true')
        raise RpcError(-errno.EBUSY, refusal.message, data) from error
    return True


@method(
    "virtio_blk_create_transport",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="a transport"),),
    style=BDEV,
    relaxed=True,
)
async def virtio_blk_create_transport(target: Target, params: Params) -> Any:
    """Refuse: the one transport is there from the start."""
    if params["name"] == TRANSPORT:
        raise AlreadyExists(f"the transport '{TRANSPORT}' is there from the start")
    raise HostError(
        f"no transport is called '{params['name']}'", errno.ENOENT, hint=f"there is {TRANSPORT}"
    )


@method(
    "virtio_blk_get_transports",
    RUNTIME,
    params=(Param("name", String(), doc="one transport; all without it"),),
    style=BDEV,
)
async def virtio_blk_get_transports(target: Target, params: Params) -> Any:
    """List the ways to offer a virtio-blk disk."""
    if params["name"] not in (None, TRANSPORT):
        raise NotFound(f"no transport is called '{params['name']}'", hint=f"there is {TRANSPORT}")
    return [{"name": TRANSPORT}]
