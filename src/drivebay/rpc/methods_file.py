"""Methods about files and block devices: aio and uring, two names for one io_uring engine."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import HostError, UsageError
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    Boolean,
    Integer,
    Param,
    Params,
    String,
    Uuid,
    method,
)

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

_NAME: Final = (Param("name", String(), required=True, doc="the bdev"),)
_BLOCK_SIZE: Final = Param("block_size", Integer(32), default=0, doc="0: what the file asks for")
_UUID: Final = Param("uuid", Uuid(), doc="a random one without it")


async def _create(target: Target, params: Params, module: str) -> str:
    name = params["name"]
    block_size = params["block_size"]
    if block_size and (block_size < 512 or block_size & (block_size - 1)):
        raise UsageError(
            f"block_size {block_size} is not a power of two from 512 on", field="block_size"
        )

    def build() -> Bdev:
        from drivebay.bdev.file import FileBdev  # loaded when the first one is made

        return FileBdev(
            name,
            params["uuid"],
            params["filename"],
            block_size,
            bool(params.get("readonly")),
            module,
            params.get("fallocate"),
        )

    bdev = await target.registry.create(name, params["uuid"], build)
    return bdev.name


async def _rescan(target: Target, name: str, module: str) -> bool:
    bdev: Any = target.registry.get_of_module(name, module)
    num_blocks = await asyncio.to_thread(bdev.rescan)
    await target.registry.resize(bdev, num_blocks)
    return True


@method(
    "bdev_aio_create",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="its name"),
        Param("filename", String(), required=True, doc="a file or a block device"),
        _BLOCK_SIZE,
        Param("readonly", Boolean(), default=False, doc="never write it"),
        Param("fallocate", Boolean(), doc="false: a guest's discard does not punch holes"),
        _UUID,
        Param("nowait", Boolean(), default=False, doc="false: the engine never blocks a reactor"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_aio_create(target: Target, params: Params) -> Any:
    """Make a disk of a file or block device, which nobody else may write meanwhile."""
    if params["nowait"]:
        raise HostError(
            "nowait has no meaning for io_uring, which never blocks a reactor",
            errno.EOPNOTSUPP,
            hint="leave it out",
        )
    return await _create(target, params, "aio")


@method("bdev_aio_delete", RUNTIME, params=_NAME, style=BDEV, changes=True)
async def bdev_aio_delete(target: Target, params: Params) -> Any:
    """Let go of a file; its content stays."""
    await target.registry.remove(params["name"], "aio")
    return True


@method("bdev_aio_rescan", RUNTIME, params=_NAME, style=BDEV)
async def bdev_aio_rescan(target: Target, params: Params) -> Any:
    """Take over the size that the file has now; guests see it."""
    return await _rescan(target, params["name"], "aio")


@method(
    "bdev_uring_create",
    RUNTIME,
    params=(
        Param("filename", String(), required=True, doc="a file or a block device"),
        Param("name", String(), required=True, doc="its name"),
        _BLOCK_SIZE,
        _UUID,
    ),
    style=BDEV,
    changes=True,
)
async def bdev_uring_create(target: Target, params: Params) -> Any:
    """Make a disk of a file or block device, which nobody else may write meanwhile."""
    return await _create(target, params, "uring")


@method("bdev_uring_delete", RUNTIME, params=_NAME, style=BDEV, changes=True)
async def bdev_uring_delete(target: Target, params: Params) -> Any:
    """Let go of a file; its content stays."""
    await target.registry.remove(params["name"], "uring")
    return True


@method("bdev_uring_rescan", RUNTIME, params=_NAME, style=BDEV)
async def bdev_uring_rescan(target: Target, params: Params) -> Any:
    """Take over the size that the file has now; guests see it."""
    return await _rescan(target, params["name"], "uring")
