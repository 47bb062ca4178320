"""Methods about error bdevs: disks that fail on demand."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.stack import part_uuid
from drivebay.errors import UsageError
from drivebay.rpc.jsonrpc import INVALID_PARAMS, RpcError
from drivebay.rpc.methods_filter import filter_wish, remove_filter
from drivebay.rpc.schema import (
    RUNTIME,
    Choice,
    ErrorStyle,
    Integer,
    Param,
    Params,
    String,
    Uuid,
    method,
)

if TYPE_CHECKING:
    from uuid import UUID

    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

_STYLE: Final = ErrorStyle(INVALID_PARAMS, "spdk_json_decode_object failed", None)
_NAME: Final = Param("name", String(), required=True, doc="the error bdev, EE_BASE")
_OPERATIONS: Final = ("read", "write", "unmap", "flush")


@method(
    "bdev_error_create",
    RUNTIME,
    params=(
        Param("base_name", String(), required=True, doc="what it stands on; may come later"),
        Param("uuid", Uuid(), doc="derived from the base's without it"),
    ),
    style=_STYLE,
    changes=True,
)
async def bdev_error_create(target: Target, params: Params) -> Any:
    """Make a disk EE_BASE that fails on demand."""
    base_name = params["base_name"]
    name = f"EE_{base_name}"

    def build(base: Bdev) -> tuple[UUID, Callable[[], Bdev]]:
        uuid = params["uuid"] or part_uuid(base, 0, base.num_blocks)

        def construct() -> Bdev:
            from drivebay.bdev.error import ErrorBdev  # compiled; loaded when the first is made

            return ErrorBdev(name, uuid, base)

        return uuid, construct

    def call() -> tuple[str, dict[str, Any]]:
        given = {"uuid": str(params["uuid"])} if params["uuid"] else {}
        return "bdev_error_create", {"base_name": base_name, **given}

    wish = filter_wish(target, "error", name, base_name, build, call, once=True)
    await target.wishes.add(wish)
    return True


@method("bdev_error_delete", RUNTIME, params=(_NAME,), style=_STYLE, changes=True)
async def bdev_error_delete(target: Target, params: Params) -> Any:
    """Remove an error bdev; its base is free again."""
    await remove_filter(target, "error", params["name"])
    return True


@method(
    "bdev_error_inject_error",
    RUNTIME,
    params=(
        _NAME,
        Param(
            "io_type",
            Choice("clear", "read", "write", "unmap", "flush", "all"),
            required=True,
            doc="which requests fail; clear: none any more",
        ),
        Param(
            "error_type",
            Choice("failure", "pending", "corrupt_data", "nomem", "nvme_failure"),
            required=True,
            doc="how they fail",
        ),
        Param("nvme_sct", Integer(32), default=0, doc="status code type; of nvme_failure only"),
        Param("nvme_sc", Integer(32), default=0, doc="status code; of nvme_failure only"),
        Param("num", Integer(32), default=1, doc="how many requests fail"),
        Param("queue_depth", Integer(64), default=0, doc="only while that many are in flight"),
        Param("corrupt_offset", Integer(64), default=0, doc="the byte of the data that is wrong"),
        Param("corrupt_value", Integer(8), default=0, doc="what it is XORed with; not 0"),
    ),
    style=_STYLE,
)
async def bdev_error_inject_error(target: Target, params: Params) -> Any:
    """Let the next requests of an error bdev fail."""
    is_nvme = params["error_type"] == "nvme_failure"
    if is_nvme != bool(params["nvme_sct"] or params["nvme_sc"]):
        raise RpcError(
            -errno.EINVAL,
            "nvme_sct or nvme_sc should be specified for NVMe error injection",
            {"hint": "give them with nvme_failure, and only with it"},
        )
    if params["error_type"] == "corrupt_data" and params["corrupt_value"] == 0:
        raise UsageError(
            "a corrupt_value of 0 leaves the data as it is", field="corrupt_value", hint="give 255"
        )
    bdev: Any = target.registry.get_of_module(params["name"], "error")
    if params["io_type"] == "clear":
        for operation in _OPERATIONS:
            bdev.clear(operation)
        return True
    for operation in _OPERATIONS if params["io_type"] == "all" else (params["io_type"],):
        bdev.inject(
            operation,
            "failure" if is_nvme else params["error_type"],  # a guest sees the same of both
            params["num"],
            params["queue_depth"],
            params["corrupt_offset"],
            params["corrupt_value"],
        )
    return True


@method("bdev_error_resume_pending", RUNTIME, params=(_NAME,), style=_STYLE)
async def bdev_error_resume_pending(target: Target, params: Params) -> Any:
    """Send the requests that an error bdev holds back on their way, and hold back no more."""
    bdev: Any = target.registry.get_of_module(params["name"], "error")
    bdev.clear_pending()
    for channel in target.registry.channels(bdev):
        resuming: Any = channel
        await resuming.resume()
    return True
