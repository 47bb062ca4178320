"""Methods about the log: what goes to standard error and to syslog."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivebay.errors import NotFound
from drivebay.rpc.jsonrpc import INVALID_PARAMS, RpcError
from drivebay.rpc.schema import (
    APP,
    BDEV,
    RUNTIME,
    STARTUP,
    Boolean,
    Choice,
    Param,
    Params,
    String,
    method,
)
from drivebay.target.log import LEVELS, LOG

if TYPE_CHECKING:
    from drivebay.target.target import Target

_LEVEL = (Param("level", Choice(*LEVELS), required=True, doc="the least severe that passes"),)
_FLAG = (Param("flag", String(), required=True, doc="one of log_get_flags, or all"),)


@method("log_get_flags", STARTUP, RUNTIME)
async def log_get_flags(target: Target, params: Params) -> Any:
    """Show which parts log their details."""
    return LOG.flags()


def _switch(flag: str, on: bool) -> bool:
    try:
        LOG.set_flag(flag, on)
    except NotFound as error:
        raise RpcError(INVALID_PARAMS, "invalid log flag", {"hint": error.hint}) from error
    return True


@method("log_set_flag", STARTUP, RUNTIME, params=_FLAG, style=APP)
async def log_set_flag(target: Target, params: Params) -> Any:
    """Log the details of one part."""
    return _switch(params["flag"], True)


@method("log_clear_flag", STARTUP, RUNTIME, params=_FLAG, style=APP)
async def log_clear_flag(target: Target, params: Params) -> Any:
    """Stop logging the details of one part."""
    return _switch(params["flag"], False)


@method("log_get_level", STARTUP, RUNTIME)
async def log_get_level(target: Target, params: Params) -> Any:
    """Return the level for syslog."""
    return LOG.level


@method("log_set_level", STARTUP, RUNTIME, params=_LEVEL, style=BDEV)
async def log_set_level(target: Target, params: Params) -> Any:
    """Set the level for syslog."""
    LOG.set_level(params["level"])
    return True


@method("log_get_print_level", STARTUP, RUNTIME)
async def log_get_print_level(target: Target, params: Params) -> Any:
    """Return the level for standard error."""
    return LOG.print_level


@method("log_set_print_level", STARTUP, RUNTIME, params=_LEVEL, style=BDEV)
async def log_set_print_level(target: Target, params: Params) -> Any:
    """Set the level for standard error."""
    LOG.set_print_level(params["level"])
    return True


@method(
    "log_enable_timestamps",
    RUNTIME,
    params=(Param("enabled", Boolean(), required=True, doc="each line begins with the time"),),
)
async def log_enable_timestamps(target: Target, params: Params) -> Any:
    """Begin lines of the log with the time, or not."""
    LOG.enable_timestamps(params["enabled"])
    return True
