"""Limiting a bdev (QoS)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.limits import LIMITS, rates_with
from drivebay.rpc.jsonrpc import RpcError
from drivebay.rpc.schema import BDEV, RUNTIME, Integer, Param, Params, String, method

if TYPE_CHECKING:
    from drivebay.target.target import Target

_NOT_GIVEN: Final = (1 << 64) - 1  # SPDK's own mark


@method(
    "bdev_set_qos_limit",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="a bdev"),
        Param(
            "rw_ios_per_sec",
            Integer(64),
            doc="reads and writes a second, rounded up to thousands; 0: no limit",
        ),
        Param("rw_mbytes_per_sec", Integer(64), doc="MiB read and written a second; 0: no limit"),
        Param("r_mbytes_per_sec", Integer(64), doc="MiB read a second; 0: no limit"),
        Param("w_mbytes_per_sec", Integer(64), doc="MiB written a second; 0: no limit"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_set_qos_limit(target: Target, params: Params) -> Any:
    """Limit what is read and written; what is not given stays as it is.

    It holds for all users of the bdev together, at once, also while they use it.
    """
    bdev = target.registry.get(params["name"])
    given = {name: params[name] for name in LIMITS if params[name] not in (None, _NOT_GIVEN)}
    if not given:
        data = {"hint": f"give one of {', '.join(LIMITS)}"}
        raise RpcError(-errno.EINVAL, "No rate limits specified", data)
    for answer in bdev.limit(rates_with(bdev, given)):
        await answer
    return True
