"""Histograms of how long requests take, and samples of how many there are."""

from __future__ import annotations

import base64
import errno
import os
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.base import OPERATIONS
from drivebay.errors import HostError
from drivebay.reactor.clock import tick_rate
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, RpcError
from drivebay.rpc.methods_bdev import IO_TYPES
from drivebay.rpc.schema import BDEV, RUNTIME, Array, Integer, Param, Params, String, method
from drivebay.rpc.schema import Boolean as Bool

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.histogram import Histogram
    from drivebay.reactor.mailbox import Answer
    from drivebay.target.target import Target

_MOST: Final = (1 << 64) - 1
_ANY: Final = -1
_NONE_OF_OURS: Final = 255
_GRANULARITY: Final = 7
_MIN_NSEC: Final = 1000
_MAX_NSEC: Final = 120_000_000_000
_BORDERS: Final = 256

_NAME = Param("name", String(), required=True, doc="a bdev")


async def _answered(answers: list[Answer]) -> None:
    for answer in answers:
        await answer


def _ticks(nanoseconds: int) -> int:
    return min(nanoseconds * tick_rate() // 10**9, _MOST)


def _operation(name: str | None) -> int:
    if name is None:
        return _ANY
    if name not in IO_TYPES:
        data = {"field": "opc", "value": name[:80], "hint": f"one of {', '.join(IO_TYPES)}"}
        raise RpcError(INTERNAL_ERROR, "Invalid Io type", data)
    return OPERATIONS.index(name) if name in OPERATIONS else _NONE_OF_OURS


@method(
    "bdev_enable_histogram",
    RUNTIME,
    params=(
        _NAME,
        Param("enable", Bool(), required=True, doc="true: begin; false: end, and forget it"),
        Param("opc", String(), doc="count one kind of request, such as read; all without it"),
        Param(
            "granularity", Integer(8), default=_GRANULARITY, doc="log2 of the buckets a power of 2"
        ),
        Param("min_nsec", Integer(64), default=_MIN_NSEC, doc="least time that is told apart"),
        Param("max_nsec", Integer(64), default=_MAX_NSEC, doc="longest time that is told apart"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_enable_histogram(target: Target, params: Params) -> Any:
    """Count how long requests take; other parameters than before begin anew."""
    from drivebay.bdev.histogram import layout_of  # compiled; loaded when first needed

    bdev = target.registry.get(params["name"])
    operation = _operation(params["opc"])
    if not params["enable"]:
        await _answered(bdev.count_times(None))
        return True
    least, most = _ticks(params["min_nsec"]), _ticks(params["max_nsec"])
    layout = layout_of(params["granularity"], least, most, operation)
    bdev.histogram_settings = {
        name: params[name]
        for name, usual in (
            ("opc", None),
            ("granularity", _GRANULARITY),
            ("min_nsec", _MIN_NSEC),
            ("max_nsec", _MAX_NSEC),
        )
        if params[name] != usual
    }
    if bdev.layout != layout:
        await _answered(bdev.count_times(layout))
    return True


def _counted(bdev: Bdev) -> Histogram:
    """What was counted; when nothing was, SPDK answers with another code than for a bdev."""
    try:
        return bdev.times()
    except HostError as error:
        data = {"reason": str(error), "hint": error.hint}
        raise RpcError(INTERNAL_ERROR, os.strerror(error.errno or errno.EIO), data) from error


@method("bdev_get_histogram", RUNTIME, params=(_NAME,), style=BDEV)
async def bdev_get_histogram(target: Target, params: Params) -> Any:
    """Show the buckets as base64 of 64-bit counts, and what each stands for (in ticks)."""
    histogram = _counted(target.registry.get(params["name"]))
    return {
        "histogram": base64.b64encode(histogram.counts()).decode("ascii"),
        "granularity": histogram.layout.granularity,
        "min_range": histogram.layout.min_range,
        "max_range": histogram.layout.max_range,
        "tsc_rate": tick_rate(),
    }


@method(
    "bdev_get_histogram_borders",
    RUNTIME,
    params=(
        _NAME,
        Param(
            "borders",
            Array(Integer(64), _BORDERS),
            required=True,
            doc="microseconds, in rising order",
        ),
    ),
    style=BDEV,
)
async def bdev_get_histogram_borders(target: Target, params: Params) -> Any:
    """Count the requests up to each of some durations, and last all of them."""
    histogram = _counted(target.registry.get(params["name"]))
    borders = [min(border * (tick_rate() // 10**6), _MOST) for border in params["borders"]]
    return {"borders_count": histogram.counted_up_to(borders)}


@method(
    "bdev_set_qd_sampling_period",
    RUNTIME,
    params=(
        _NAME,
        Param("period", Integer(64), required=True, doc="microseconds, at least 1000; 0: no more"),
    ),
    style=BDEV,
)
async def bdev_set_qd_sampling_period(target: Target, params: Params) -> Any:
    """Look at the queue depth of a bdev in intervals; bdev_get_iostat shows it then."""
    from drivebay.bdev.sampling import Sampler

    bdev = target.registry.get(params["name"])
    if bdev.sampler is not None:
        bdev.sampler.stop()
    period = params["period"]
    bdev.sampler = Sampler(bdev, period, lambda: bdev in target.registry) if period else None
    return True
