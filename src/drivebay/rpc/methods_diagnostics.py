"""What a maintainer asks of a target that misbehaves, in one answer."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from drivebay.rpc.methods_framework import version_text
from drivebay.rpc.schema import RUNTIME, STARTUP, Params, method
from drivebay.target.log import LOG

if TYPE_CHECKING:
    from drivebay.target.target import Target


@method("drivebay_get_diagnostics", STARTUP, RUNTIME)
async def drivebay_get_diagnostics(target: Target, params: Params) -> Any:
    """Show version, options, standstills of reactors and the last lines of the log."""
    options = asdict(target.options)
    allowed = target.options.rpcs_allowed
    options["rpcs_allowed"] = None if allowed is None else sorted(allowed)
    reactors = [reactor.stats() for reactor in target.reactors]
    return {
        "version": version_text(),
        "python": sys.version,
        "time": time.time(),
        "state": target.state,
        "options": options,
        "reactors": [{"core": stats.core, "place": stats.place} for stats in reactors],
        "standstills": [asdict(found) for found in target.watchdog.history],
        "log": LOG.recent(),
    }
