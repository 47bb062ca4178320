"""Methods about bdevs without a backing store: malloc (memory) and null (nothing)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

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

_U32: Final = Integer(32)
_U64: Final = Integer(64)
_I32: Final = Integer(32, signed=True)
_MIB: Final = 1024 * 1024
_METADATA_SIZES: Final = (0, 8, 16, 32, 64, 128)
_NAME: Final = (Param("name", String(), required=True, doc="the bdev"),)
_KEPT: Final = "kept for save_config; guests see no difference"

# Hints to other parts of SPDK: remembered, so that a saved configuration stays complete.
_HINTS: Final = (
    "physical_block_size",
    "optimal_io_boundary",
    "preferred_write_granularity",
    "preferred_write_alignment",
    "optimal_write_size",
    "preferred_unmap_granularity",
    "preferred_unmap_alignment",
)


def _hint(name: str) -> Param:
    return Param(name, _U32, default=0, doc=_KEPT)


_METADATA: Final = (
    Param("md_size", _U32, default=0, doc="0: no bdev here has metadata"),
    Param("dif_type", _I32, default=0, doc="0: no protection information"),
    Param("dif_is_head_of_md", Boolean(), default=False, doc="of no effect without metadata"),
    Param("dif_pi_format", _U32, default=0, doc="0: no protection information"),
)


def _refuse_metadata(params: Params) -> None:
    if params["md_size"] not in _METADATA_SIZES:
        raise UsageError(
            f"md_size {params['md_size']} is none of {_METADATA_SIZES}", field="md_size"
        )
    for field in ("md_size", "dif_type", "dif_pi_format"):
        if params[field]:
            raise HostError(
                f"{field} {params[field]}: bdevs with metadata are not part of this version",
                errno.EOPNOTSUPP,
                hint="leave it out",
            )


def _kept_hints(params: Params) -> dict[str, int]:
    return {name: params[name] for name in _HINTS if params.get(name)}


@method(
    "bdev_malloc_create",
    RUNTIME,
    params=(
        Param("name", String(), doc="Malloc0, Malloc1 … without it"),
        Param("block_size", _U32, required=True, doc="512 to 65536, a power of two"),
        Param("num_blocks", _U64, required=True, doc="its size in blocks"),
        Param("uuid", Uuid(), doc="a random one without it"),
        _hint("optimal_io_boundary"),
        Param("md_interleave", Boolean(), default=False, doc="of no effect without metadata"),
        *_METADATA,
        _hint("physical_block_size"),
        Param("numa_id", _I32, default=-1, doc="-1: memory from any node"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_malloc_create(target: Target, params: Params) -> Any:
    """Make a disk of memory; its content is gone when the target ends."""
    name = target.malloc_name() if params["name"] is None else params["name"]
    if params["block_size"] == 0:
        raise HostError("block_size is 0", errno.ENOMEM, hint="give 512 or 4096")
    _check_block_size(params["block_size"])
    _refuse_metadata(params)
    if params["numa_id"] != -1:
        raise HostError(
            f"numa_id {params['numa_id']}: memory of one NUMA node is not part of this version",
            errno.EOPNOTSUPP,
            hint="leave it out",
        )
    size = params["block_size"] * params["num_blocks"]
    target.memory.reserve(size)
    return await _create(
        target, name, params, _malloc(name, params), lambda: target.memory.release(size)
    )


def _malloc(name: str, params: Params) -> Callable[[], Bdev]:
    def build() -> Bdev:
        from drivebay.bdev.malloc import MallocBdev  # loaded when the first one is made

        return MallocBdev(name, params["uuid"], params["block_size"], params["num_blocks"])

    return build


def _null(params: Params) -> Callable[[], Bdev]:
    def build() -> Bdev:
        from drivebay.bdev.null import NullBdev

        return NullBdev(params["name"], params["uuid"], params["block_size"], params["num_blocks"])

    return build


async def _create(
    target: Target,
    name: str,
    params: Params,
    build: Callable[[], Bdev],
    on_closed: Callable[[], None] | None = None,
) -> str:
    uuid: UUID | None = params["uuid"]
    bdev = await target.registry.create(name, uuid, build, on_closed)
    target.keep_parameters(bdev, _kept_hints(params))
    return bdev.name


def _check_block_size(block_size: int) -> None:
    if block_size < 512 or block_size % 512:
        raise UsageError(
            f"block_size {block_size} is not a multiple of 512", field="block_size", hint="give 512"
        )


@method("bdev_malloc_delete", RUNTIME, params=_NAME, style=BDEV, changes=True)
async def bdev_malloc_delete(target: Target, params: Params) -> Any:
    """Remove a malloc bdev; guests that use it see I/O errors."""
    await target.registry.remove(params["name"], "malloc")
    return True


@method(
    "bdev_null_create",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="its name"),
        Param("block_size", _U32, required=True, doc="512 to 65536, a power of two"),
        Param("num_blocks", _U64, required=True, doc="its size in blocks"),
        Param("uuid", Uuid(), doc="a random one without it"),
        _hint("physical_block_size"),
        *_METADATA,
        _hint("preferred_write_granularity"),
        _hint("preferred_write_alignment"),
        _hint("optimal_write_size"),
        _hint("preferred_unmap_granularity"),
        _hint("preferred_unmap_alignment"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_null_create(target: Target, params: Params) -> Any:
    """Make a disk that takes every write and keeps nothing, for measuring."""
    _check_block_size(params["block_size"])
    _refuse_metadata(params)
    return await _create(target, params["name"], params, _null(params))


@method("bdev_null_delete", RUNTIME, params=_NAME, style=BDEV, changes=True)
async def bdev_null_delete(target: Target, params: Params) -> Any:
    """Remove a null bdev."""
    await target.registry.remove(params["name"], "null")
    return True


@method(
    "bdev_null_resize",
    RUNTIME,
    params=(*_NAME, Param("new_size", _U64, required=True, doc="MiB; not smaller than now")),
    style=BDEV,
    changes=True,
)
async def bdev_null_resize(target: Target, params: Params) -> Any:
    """Make a null bdev larger; guests see the new size."""
    bdev = target.registry.get_of_module(params["name"], "null")
    num_blocks = params["new_size"] * _MIB // bdev.block_size
    if num_blocks < bdev.num_blocks:
        raise UsageError(
            f"{params['new_size']} MiB is less than the {bdev.num_blocks} blocks of "
            f"bdev '{bdev.name}'",
            field="new_size",
        )
    await target.registry.resize(bdev, num_blocks)
    return True
