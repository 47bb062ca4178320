"""Methods about the process itself: methods, version, subsystems, states, signals, events."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
from typing import TYPE_CHECKING, Any, Final

from drivebay.rpc.config import SUBSYSTEMS, subsystem_config
from drivebay.rpc.jsonrpc import INVALID_PARAMS, RpcError
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    STARTUP,
    Boolean,
    Choice,
    Integer,
    Param,
    Params,
    String,
    method,
)
from drivebay.target.notifications import EVENT_TYPES

if TYPE_CHECKING:
    from drivebay.target.target import Target

# The release of SPDK whose methods these are: clients look at major and minor to decide
# what they may call.
SPDK_MAJOR: Final = 26
SPDK_MINOR: Final = 9


@functools.cache
def version_text() -> str:
    """Our own version, read from the installed package."""
    from importlib.metadata import PackageNotFoundError, version  # slow; only when asked

    try:
        return version("drivebay")
    except PackageNotFoundError:
        return "0"


@method(
    "spdk_get_version",
    STARTUP,
    RUNTIME,
    takes_nothing="spdk_get_version method requires no parameters",
)
async def spdk_get_version(target: Target, params: Params) -> Any:
    """Say which program this is, and the SPDK release whose methods it speaks."""
    own = version_text()
    return {
        "version": f"Drivebay v{own} (speaks SPDK v{SPDK_MAJOR}.{SPDK_MINOR:02})",
        "fields": {
            "major": SPDK_MAJOR,
            "minor": SPDK_MINOR,
            "patch": 0,
            "suffix": f"-drivebay-{re.sub('[^0-9A-Za-z.]', '.', own)}",
        },
    }


@method(
    "rpc_get_methods",
    STARTUP,
    RUNTIME,
    params=(
        Param("current", Boolean(), default=False, doc="only what may be called now"),
        Param("include_aliases", Boolean(), default=False, doc="there are none"),
    ),
)
async def rpc_get_methods(target: Target, params: Params) -> Any:
    """List the methods."""
    return [
        name
        for name, declared in target.rpc_methods.items()
        if not params["current"] or target.state in declared.states
    ]


@method("framework_start_init", STARTUP)
async def framework_start_init(target: Target, params: Params) -> Any:
    """Leave the startup state; answers when the target is ready."""
    target.start_runtime()
    await target.wait_init()
    return True


@method("framework_wait_init", STARTUP, RUNTIME, waits=True)
async def framework_wait_init(target: Target, params: Params) -> Any:
    """Answer when the target is ready."""
    await target.wait_init()
    return True


@method("framework_get_subsystems", RUNTIME)
async def framework_get_subsystems(target: Target, params: Params) -> Any:
    """List the parts that have a configuration, each after those that it needs."""
    return [
        {"subsystem": name, "depends_on": list(depends)} for name, depends in SUBSYSTEMS.items()
    ]


@method(
    "framework_get_config",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="a subsystem"),
        Param("with_batches", Boolean(), default=False, doc="no entry is a batch here"),
    ),
)
async def framework_get_config(target: Target, params: Params) -> Any:
    """Return the calls that rebuild one subsystem as it is now."""
    if params["name"] not in SUBSYSTEMS:
        raise RpcError(INVALID_PARAMS, f"Subsystem '{params['name'][:80]}' not found")
    return subsystem_config(target, params["name"])


_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1")


@method(
    "spdk_kill_instance",
    RUNTIME,
    params=(Param("sig_name", Choice(*_SIGNALS), required=True, doc="the signal"),),
)
async def spdk_kill_instance(target: Target, params: Params) -> Any:
    """Send this process a signal; SIGTERM and SIGINT end it in good order."""
    number = signal.Signals[params["sig_name"]]
    # The answer is written before the loop runs anything else.
    asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), number)
    return True


@method("notify_get_types", RUNTIME)
async def notify_get_types(target: Target, params: Params) -> Any:
    """List the kinds of events."""
    return list(EVENT_TYPES)


@method(
    "notify_get_notifications",
    RUNTIME,
    params=(
        Param("id", Integer(64), default=0, doc="the first event that is wanted"),
        Param("max", Integer(64), default=(1 << 64) - 1, doc="how many at most"),
    ),
    style=BDEV,
)
async def notify_get_notifications(target: Target, params: Params) -> Any:
    """Return events, oldest first; the last 1024 are kept."""
    return target.notifications.since(params["id"], params["max"])
