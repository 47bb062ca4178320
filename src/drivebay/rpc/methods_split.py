"""Methods about split: one bdev cut into parts of equal size."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.wishes import Wish
from drivebay.errors import AlreadyExists, DrivebayError, NotFound
from drivebay.rpc.jsonrpc import INVALID_PARAMS, RpcError
from drivebay.rpc.schema import (
    APP,
    RUNTIME,
    ErrorStyle,
    Integer,
    Param,
    Params,
    String,
    method,
    rpc_error_of,
)

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

_STYLE: Final = ErrorStyle(APP.params_code, APP.params_message, INVALID_PARAMS)


@method(
    "bdev_split_create",
    RUNTIME,
    params=(
        Param("base_bdev", String(), required=True, doc="what is cut; may come later"),
        Param("split_count", Integer(32), required=True, doc="how many parts, at most"),
        Param("split_size_mb", Integer(64), default=0, doc="MiB of each; 0: all that there is"),
    ),
    style=_STYLE,
    changes=True,
)
async def bdev_split_create(target: Target, params: Params) -> Any:
    """Cut a disk into parts: BASEp0, BASEp1 …; answers their names, none while it isn't here."""
    base_name, count, size_mb = params["base_bdev"], params["split_count"], params["split_size_mb"]

    try:
        if target.wishes.find("split", base_name) is not None:
            raise AlreadyExists(
                f"bdev '{base_name[:80]}' is cut already", hint="end that with bdev_split_delete"
            )
        parts = await target.wishes.add(_wish(target, base_name, count, size_mb))
    except DrivebayError as error:
        refusal = rpc_error_of(_STYLE, error)
        what = f"Failed to create {count} split bdevs from '{base_name[:255]}'"
        raise RpcError(refusal.code, f"{what}: {refusal.message}", refusal.data) from error
    return [part.name for part in parts or []]


def _wish(target: Target, base_name: str, count: int, size_mb: int) -> Wish:
    async def make(base: Bdev) -> list[Bdev]:
        from drivebay.bdev.split import split  # on a compiled module; loaded when first needed

        return await split(target.registry, base, base_name, count, size_mb)

    def call() -> tuple[str, dict[str, Any]]:
        params = {"base_bdev": base_name, "split_count": count, "split_size_mb": size_mb}
        return "bdev_split_create", params

    return Wish("split", base_name, (base_name,), make, call, once=True)


@method(
    "bdev_split_delete",
    RUNTIME,
    params=(Param("base_bdev", String(), required=True, doc="the bdev that was cut"),),
    style=_STYLE,
    changes=True,
)
async def bdev_split_delete(target: Target, params: Params) -> Any:
    """Remove all parts of a disk; it is free again."""
    base_name = params["base_bdev"]
    wish = target.wishes.find("split", base_name)
    if wish is None:
        missing = NotFound(f"bdev '{base_name[:80]}' is not cut into parts")
        missing.errno = errno.ENOENT  # SPDK's answer
        raise missing
    target.wishes.forget(wish)
    for bdev in target.registry:
        if bdev.module == "split" and bdev.bases == wish.made_on:
            with contextlib.suppress(NotFound):
                await target.registry.remove(bdev.name)
    return True
