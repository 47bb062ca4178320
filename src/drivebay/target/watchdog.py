"""Says which reactor stands still, and where.

Context: control, once a second. A reactor that neither sleeps nor turns its loop serves
no guest; somebody must be told which call it is stuck in. Each standstill is logged once,
and once more when it is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivebay.reactor.reactor import Reactor

__all__ = ["Watchdog"]

_log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Watchdog:
    """Compares what the reactors count with what they counted a period ago."""

    def __init__(self, reactors: Sequence[Reactor]) -> None:
        self._reactors = reactors
        self._loops: dict[int, int] = {}
        self._still: set[int] = set()

    def check(self) -> None:
        """Look once."""
        for reactor in self._reactors:
            stats = reactor.stats()
            moved = stats.sleeping or stats.loops != self._loops.get(stats.core)
            self._loops[stats.core] = stats.loops
            if not moved and stats.core not in self._still:
                self._still.add(stats.core)
                _log.error(
                    "the reactor on core %d (thread %d) stands still in '%s': no disk of that "
                    "core is served",
                    stats.core,
                    stats.tid,
                    stats.place,
                )
            elif moved and stats.core in self._still:
                self._still.discard(stats.core)
                _log.info("the reactor on core %d moves again", stats.core)

    async def run(self) -> None:
        """Look every period until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.check()
