"""Methods about files and block devices: aio and uring, two names for one io_uring engine."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import HostError, InUse, UsageError
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

_log = logging.getLogger(__name__)

HOLDER_LIMIT_S: Final = 30.0
_QUIET_S: Final = 1.0
_RETRY_S: Final = 0.02
_RETRY_MOST_S: Final = 0.5

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

    def create() -> Awaitable[Bdev]:
        return target.registry.create(name, params["uuid"], build)

    bdev = await (_wait_for_holder(create) if target.loading else create())
    return bdev.name


async def _wait_for_holder(attempt: Callable[[], Awaitable[Bdev]]) -> Bdev:
    """Try until nobody holds the file any more. Raises: InUse after HOLDER_LIMIT_S.

    A target that was killed keeps its lock while the kernel is at its last requests, and its
    successor must not start new ones before those have landed or died. Only a configuration
    waits so; a client wants to hear at once that a file is in use.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    pause_s = _RETRY_S
    told = False
    while True:
        try:
            return await attempt()
        except InUse as held:
            waited_s = loop.time() - began
            if waited_s >= HOLDER_LIMIT_S:
                raise
            if waited_s >= _QUIET_S and not told:
                told = True
                _log.warning("%s: waiting up to %d s for that to end", held, HOLDER_LIMIT_S)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _RETRY_MOST_S)  # each attempt looks who holds it


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
