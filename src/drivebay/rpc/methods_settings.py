"""Methods that set options. Most of them tune what is not here; see target/settings.py."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import HostError, UsageError
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from drivebay.rpc.schema import (
    APP,
    BDEV,
    RUNTIME,
    STARTUP,
    Array,
    Boolean,
    Choice,
    Integer,
    Kind,
    Param,
    Params,
    String,
    Structure,
    method,
)

if TYPE_CHECKING:
    from drivebay.target.target import Target

_log = logging.getLogger(__name__)

_U8: Final = Integer(8)
_U16: Final = Integer(16)
_U32: Final = Integer(32)
_U64: Final = Integer(64)
_I32: Final = Integer(32, signed=True)
_BOOL: Final = Boolean()
_WORDS: Final = Array(String())


def _params(**kinds: Kind) -> tuple[Param, ...]:
    return tuple(Param(name, kind, doc="kept") for name, kind in kinds.items())


def _keep(target: Target, name: str, given: Mapping[str, Any]) -> bool:
    target.settings.merge(name, given)
    if target.state == RUNTIME or any(value is not None for value in given.values()):
        _log.debug("%s: kept for the saved configuration, of no effect here", name)
    return True


@method(
    "framework_set_scheduler",
    STARTUP,
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="static: a queue stays on its reactor"),
        Param("period", _U64, doc="of no effect with static"),
        Param("load_limit", _U8, doc="of no effect with static"),
        Param("core_limit", _U8, doc="of no effect with static"),
        Param("core_busy", _U8, doc="of no effect with static"),
        Param("mappings", String(), doc="refused: give a controller a cpumask"),
    ),
)
async def framework_set_scheduler(target: Target, params: Params) -> Any:
    """Choose the scheduler; there is only the static one."""
    if params["name"] != "static" or params["mappings"]:
        field = "name" if params["name"] != "static" else "mappings"
        data = {
            "field": field,
            "value": params[field][:80],
            "hint": "the scheduler is always static; place a controller by its cpumask",
        }
        raise RpcError(INTERNAL_ERROR, f"Unknown error {-errno.EINVAL}", data)
    return True


@method("framework_get_scheduler", STARTUP, RUNTIME)
async def framework_get_scheduler(target: Target, params: Params) -> Any:
    """Show the scheduler."""
    return {
        "scheduler_name": "static",
        "scheduler_period": 0,
        "isolated_core_mask": "0",
        "scheduling_core": target.options.cores[0],
    }


@method("framework_get_governor", RUNTIME)
async def framework_get_governor(target: Target, params: Params) -> Any:
    """Show who governs the frequency of the cores: the kernel, so nothing."""
    return {}


_IOBUF_LEAST: Final = {
    "small_pool_count": 64,
    "large_pool_count": 8,
    "small_bufsize": 4096,
    "large_bufsize": 8192,
}


@method(
    "iobuf_set_options",
    STARTUP,
    params=_params(
        small_pool_count=_U64,
        large_pool_count=_U64,
        small_bufsize=_U32,
        large_bufsize=_U32,
        enable_numa=_BOOL,
    ),
    style=BDEV,
)
async def iobuf_set_options(target: Target, params: Params) -> Any:
    """Keep the sizes of SPDK's buffer pools; no I/O waits for a pool here."""
    for field, least in _IOBUF_LEAST.items():
        if params[field] is not None and params[field] < least:
            raise UsageError(f"{field} {params[field]} is below {least}", field=field)
    return _keep(target, "iobuf_set_options", params)


@method("iobuf_get_stats", RUNTIME)
async def iobuf_get_stats(target: Target, params: Params) -> Any:
    """Show who takes buffers from SPDK's pools: nobody here does."""
    return []


@method(
    "bdev_set_options",
    STARTUP,
    params=_params(
        bdev_io_pool_size=_U32,
        bdev_io_cache_size=_U32,
        bdev_auto_examine=_BOOL,
        iobuf_small_cache_size=_U32,
        iobuf_large_cache_size=_U32,
    ),
    style=BDEV,
)
async def bdev_set_options(target: Target, params: Params) -> Any:
    """Say whether new disks are looked into (bdev_auto_examine); pool sizes are only kept."""
    now = {**target.settings.get("bdev_set_options")}
    now.update((key, value) for key, value in params.items() if value is not None)
    pool, cache = now["bdev_io_pool_size"], now["bdev_io_cache_size"]
    if pool < cache * (len(target.options.cores) + 1):
        raise RpcError(INVALID_PARAMS, f"Pool size {pool} too small for cache size {cache}")
    target.registry.examining.automatic = now["bdev_auto_examine"]
    return _keep(target, "bdev_set_options", params)


@method(
    "accel_set_options",
    STARTUP,
    params=_params(
        small_cache_size=_U32,
        large_cache_size=_U32,
        task_count=_U32,
        sequence_count=_U32,
        buf_count=_U32,
    ),
    style=BDEV,
)
async def accel_set_options(target: Target, params: Params) -> Any:
    """Keep the options of SPDK's accelerator framework, which is not here."""
    return _keep(target, "accel_set_options", params)


@method(
    "fsdev_set_opts",
    RUNTIME,
    params=(
        Param("fsdev_io_pool_size", _U32, required=True, doc="kept"),
        Param("fsdev_io_cache_size", _U32, required=True, doc="kept"),
    ),
    style=BDEV,
    changes=True,
)
async def fsdev_set_opts(target: Target, params: Params) -> Any:
    """Keep the options of SPDK's shared file systems, which are not here."""
    return _keep(target, "fsdev_set_opts", params)


@method("fsdev_get_opts", RUNTIME)
async def fsdev_get_opts(target: Target, params: Params) -> Any:
    """Show what fsdev_set_opts was given."""
    return dict(target.settings.get("fsdev_set_opts"))


_SOCKETS: Final = Choice("posix", "uring", "ssl")


@method(
    "sock_set_default_impl",
    STARTUP,
    params=(Param("impl_name", _SOCKETS, required=True, doc="kept"),),
)
async def sock_set_default_impl(target: Target, params: Params) -> Any:
    """Keep the choice of SPDK's network sockets; nothing here uses the network."""
    return _keep(target, "sock_set_default_impl", params)


@method("sock_get_default_impl", STARTUP, RUNTIME)
async def sock_get_default_impl(target: Target, params: Params) -> Any:
    """Show what sock_set_default_impl was given."""
    return dict(target.settings.get("sock_set_default_impl"))


@method(
    "sock_impl_set_options",
    STARTUP,
    params=(
        Param("impl_name", _SOCKETS, required=True, doc="whose options"),
        *_params(
            recv_buf_size=_U32,
            send_buf_size=_U32,
            enable_recv_pipe=_BOOL,
            enable_quickack=_BOOL,
            enable_placement_id=_U32,
            enable_zerocopy_send_server=_BOOL,
            enable_zerocopy_send_client=_BOOL,
            zerocopy_threshold=_U32,
            tls_version=_U32,
            enable_ktls=_BOOL,
        ),
    ),
    style=APP,
)
async def sock_impl_set_options(target: Target, params: Params) -> Any:
    """Keep the options of SPDK's network sockets; nothing here uses the network."""
    return _keep(target, f"sock_impl_set_options {params['impl_name']}", params)


@method(
    "sock_impl_get_options",
    STARTUP,
    RUNTIME,
    params=(Param("impl_name", _SOCKETS, required=True, doc="whose options"),),
)
async def sock_impl_get_options(target: Target, params: Params) -> Any:
    """Show what sock_impl_set_options was given."""
    kept = dict(target.settings.get(f"sock_impl_set_options {params['impl_name']}"))
    del kept["impl_name"]
    return kept


@method(
    "bdev_nvme_set_options",
    STARTUP,
    RUNTIME,
    params=_params(
        action_on_timeout=Choice("none", "reset", "abort"),
        timeout_us=_U64,
        timeout_admin_us=_U64,
        keep_alive_timeout_ms=_U32,
        arbitration_burst=_U32,
        low_priority_weight=_U32,
        medium_priority_weight=_U32,
        high_priority_weight=_U32,
        nvme_adminq_poll_period_us=_U64,
        nvme_ioq_poll_period_us=_U64,
        io_queue_requests=_U32,
        delay_cmd_submit=_BOOL,
        transport_retry_count=_U32,
        bdev_retry_count=_I32,
        transport_ack_timeout=_U8,
        ctrlr_loss_timeout_sec=_I32,
        reconnect_delay_sec=_U32,
        fast_io_fail_timeout_sec=_U32,
        disable_auto_failback=_BOOL,
        generate_uuids=_BOOL,
        transport_tos=_U8,
        nvme_error_stat=_BOOL,
        rdma_srq_size=_U32,
        io_path_stat=_BOOL,
        allow_accel_sequence=_BOOL,
        rdma_max_cq_size=_U32,
        rdma_cm_event_timeout_ms=_U16,
        dhchap_digests=_WORDS,
        dhchap_dhgroups=_WORDS,
        rdma_umr_per_io=_BOOL,
        tcp_connect_timeout_ms=_U32,
        enable_flush=_BOOL,
        multipath_opts=Structure(),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_nvme_set_options(target: Target, params: Params) -> Any:
    """Keep the defaults for NVMe controllers, which are not here yet."""
    return _keep(target, "bdev_nvme_set_options", params)


@method(
    "bdev_nvme_set_hotplug",
    RUNTIME,
    params=(
        Param("enable", _BOOL, required=True, doc="false: there is no NVMe driver to plug into"),
        Param("period_us", _U64, doc="kept"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_nvme_set_hotplug(target: Target, params: Params) -> Any:
    """Keep the choice not to look for new NVMe devices; looking is refused."""
    if params["enable"]:
        raise HostError("NVMe devices are not part of this version", errno.EOPNOTSUPP)
    given = {"period_us": params["period_us"], "enable": False}
    return _keep(target, "bdev_nvme_set_hotplug", given)
