"""Methods about bdevs of every kind: what there is, and what it has done."""

from __future__ import annotations

import errno
import functools
import time
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.in_slices import in_slices
from drivebay.bdev.limits import limits_of
from drivebay.errors import HostError, UsageError
from drivebay.reactor.clock import tick_rate
from drivebay.rpc.methods_thread import thread_id
from drivebay.rpc.schema import BDEV, RUNTIME, Array, Choice, Integer, Param, Params, String, method
from drivebay.rpc.schema import Boolean as Bool

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev, OpStats
    from drivebay.target.target import Target

# SPDK's list, in its order. What is not among a bdev's io_types is false: nothing here
# promises an operation that no front end can reach.
IO_TYPES: Final = (
    "read", "write", "unmap", "flush", "reset", "nvme_admin", "nvme_io", "nvme_io_md",
    "write_zeroes", "zcopy", "get_zone_info", "zone_management", "zone_append", "compare",
    "compare_and_write", "abort", "seek_hole", "seek_data", "copy", "nvme_iov_md", "nvme_nssr",
    "write_uncorrectable",
)  # fmt: skip


_SHOWN_AT_ONCE: Final = 100  # then the loop's other work has a turn
_FILTERS: Final = ("split", "gpt", "passthru", "delay", "error", "crypto")


def _is_memory(bdev: Bdev) -> bool:
    """Whether it is a malloc bdev in the end: SPDK shows those with a NUMA node."""
    below: Bdev | None = bdev
    while below is not None and below.module in _FILTERS:
        below = below.bases[0]
    return below is not None and below.module == "malloc"


@functools.cache
def _supported(io_types: frozenset[str]) -> dict[str, bool]:
    return {name: name in io_types for name in IO_TYPES}


def describe(target: Target, bdev: Bdev) -> dict[str, Any]:
    """One bdev as bdev_get_bdevs shows it."""
    kept = target.kept_parameters(bdev)
    uuid = str(bdev.uuid)
    shown: dict[str, Any] = {
        "name": bdev.name,
        "aliases": [name for name in dict.fromkeys((uuid, *bdev.aliases)) if name != bdev.name],
        "product_name": bdev.product_name,
        "block_size": bdev.block_size,
        "num_blocks": bdev.num_blocks,
        "preferred_write_alignment": kept.get("preferred_write_alignment", 0),
        "preferred_write_granularity": kept.get("preferred_write_granularity", 0),
        "optimal_write_size": kept.get("optimal_write_size", 0),
        "preferred_unmap_alignment": kept.get("preferred_unmap_alignment", 0),
        "preferred_unmap_granularity": kept.get("preferred_unmap_granularity", 0),
        "uuid": uuid,
    }
    if _is_memory(bdev):
        shown["numa_id"] = -1
    claim = target.registry.claims(bdev).kind
    shown["assigned_rate_limits"] = limits_of(bdev)
    shown["claimed"] = claim is not None
    if claim is not None:
        shown["claim_type"] = claim
    shown["zoned"] = False
    shown["supported_io_types"] = _supported(bdev.io_types)
    shown["driver_specific"] = bdev.driver_specific()
    return shown


@method(
    "bdev_get_bdevs",
    RUNTIME,
    params=(
        Param("name", String(), doc="one bdev, by name, alias or uuid; all without it"),
        Param("timeout", Integer(64), default=0, doc="milliseconds to wait for it to appear"),
    ),
    style=BDEV,
    waits=True,
)
async def bdev_get_bdevs(target: Target, params: Params) -> Any:
    """Show bdevs in the order of their creation."""
    name = params["name"]
    if name is None:
        return await _describe_all(target)
    if not params["timeout"]:
        return [describe(target, target.registry.get(name))]
    try:
        bdev = await target.registry.wait_for(name, params["timeout"] / 1000)
    except TimeoutError as error:
        waited = f"no bdev called '{name[:80]}' appeared within {params['timeout']} ms"
        raise HostError(waited, errno.ETIMEDOUT) from error
    return [describe(target, bdev)]


async def _describe_all(target: Target) -> list[dict[str, Any]]:
    slices = in_slices(target.registry, _SHOWN_AT_ONCE)
    return [describe(target, bdev) async for bdev in slices if bdev in target.registry]


@method("bdev_wait_for_examine", RUNTIME)
async def bdev_wait_for_examine(target: Target, params: Params) -> Any:
    """Answer when every bdev that is here has been looked into."""
    await target.registry.examining.wait()
    return True


@method(
    "bdev_examine",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="a bdev"),),
    style=BDEV,
    changes=True,
)
async def bdev_examine(target: Target, params: Params) -> Any:
    """Look into a bdev, now or when it comes; refused while bdev_auto_examine is on."""
    target.registry.examining.examine_by_hand(params["name"])
    return True


_MODES: Final = Choice("all", "maxmin", "error", "none")


@method(
    "bdev_get_iostat",
    RUNTIME,
    params=(
        Param("names", Array(String()), doc="bdevs; all without it"),
        Param("per_channel", Bool(), default=False, doc="by reactor; for one bdev"),
        Param("reset_mode", _MODES, default="none", doc="what is set to zero after reading"),
    ),
    style=BDEV,
)
async def bdev_get_iostat(target: Target, params: Params) -> Any:
    """Count operations, bytes, errors and latencies (in ticks) of bdevs."""
    names = params["names"]
    registry = target.registry
    bdevs = list(registry) if names is None else [registry.get(name) for name in names]
    if params["per_channel"] and (names is None or len(bdevs) != 1):
        raise UsageError(
            f"per_channel is for exactly one bdev that is named, {len(bdevs)} are meant",
            field="per_channel",
        )
    rate = tick_rate()
    answer: dict[str, Any] = {"tick_rate": rate, "ticks": time.monotonic_ns() * rate // 10**9}
    if params["per_channel"]:
        answer["name"] = bdevs[0].name
        answer["channels"] = [
            {"thread_id": thread_id(target, channel), **counts(channel.stats())}
            for channel in registry.channels(bdevs[0])
        ]
    else:
        answer["bdevs"] = [
            {"name": bdev.name, **counts(bdev.iostat()), **sampled(bdev)} for bdev in bdevs
        ]
    for bdev in bdevs:
        reset(bdev, params["reset_mode"])
    return answer


def counts(stats: dict[str, OpStats]) -> dict[str, Any]:
    """Counters in SPDK's words and order; we never copy within a bdev."""
    figures: dict[str, int] = {}
    latencies: dict[str, int] = {}
    for operation, ops_name, bytes_name in (
        ("read", "read", "read"),
        ("write", "write", "written"),
        ("unmap", "unmap", "unmapped"),
        ("copy", "copy", "copied"),
    ):
        found = stats.get(operation)
        figures[f"bytes_{bytes_name}"] = found.bytes if found else 0
        figures[f"num_{ops_name}_ops"] = found.ops if found else 0
        latencies[f"{operation}_latency_ticks"] = found.latency_ticks if found else 0
        latencies[f"max_{operation}_latency_ticks"] = found.max_latency_ticks if found else 0
        latencies[f"min_{operation}_latency_ticks"] = found.min_latency_ticks if found else 0
    failed = sum(found.errors for found in stats.values())
    return {**figures, **latencies, "io_error": {"failed": failed} if failed else {}}


def sampled(bdev: Bdev) -> dict[str, int]:
    """What bdev_set_qd_sampling_period has shown since it was called."""
    sampler = bdev.sampler
    if sampler is None:
        return {}
    return {
        "queue_depth_polling_period": sampler.period_us,
        "queue_depth": sampler.queue_depth,
        "io_time": sampler.io_time_us,
        "weighted_io_time": sampler.weighted_io_time_us,
    }


def reset(bdev: Bdev, mode: str) -> None:
    """Set the counters that ``mode`` names to zero."""
    if mode != "none":
        bdev.reset_iostat(mode)


@method(
    "bdev_reset_iostat",
    RUNTIME,
    params=(
        Param("name", String(), doc="one bdev; all without it"),
        Param("mode", _MODES, default="all", doc="what is set to zero"),
    ),
    style=BDEV,
)
async def bdev_reset_iostat(target: Target, params: Params) -> Any:
    """Set the counters of bdevs to zero."""
    name = params["name"]
    registry = target.registry
    for bdev in list(registry) if name is None else [registry.get(name)]:
        reset(bdev, params["mode"])
    return True
