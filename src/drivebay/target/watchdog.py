"""Says which reactor stands still, and where.

Context: control, a few times a second. A reactor that neither sleeps nor turns its loop serves
no guest; somebody must be told which call it is stuck in. Each standstill is logged once,
and once more when it is over. One kind is ended here: a guest's call eventfd whose other
holder filled it and made it blocking, while the reactor writes to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivebay.reactor.reactor import Reactor, ReactorStats

__all__ = ["Watchdog"]

_log = logging.getLogger(__name__)

PERIOD_S = 0.25
LOGGED_AFTER = 4  # periods: what is over sooner is no news
NOTIFYING = "notifying a guest"


class Watchdog:
    """Compares what the reactors count with what they counted a period ago."""

    def __init__(self, reactors: Sequence[Reactor]) -> None:
        self._reactors = reactors
        self._loops: dict[int, int] = {}
        self._still: dict[int, int] = {}  # core: for how many periods

    def check(self) -> None:
        """Look once."""
        for reactor in self._reactors:
            stats = reactor.stats()
            moved = stats.sleeping or stats.loops != self._loops.get(stats.core)
            self._loops[stats.core] = stats.loops
            if moved:
                self._moves(stats.core)
            else:
                self._stands_still(reactor, stats)

    def _moves(self, core: int) -> None:
        if self._still.pop(core, 0) >= LOGGED_AFTER:
            _log.info("the reactor on core %d moves again", core)

    def _stands_still(self, reactor: Reactor, stats: ReactorStats) -> None:
        periods = self._still[stats.core] = self._still.get(stats.core, 0) + 1
        if stats.place == NOTIFYING:
            reactor.rescue()
        if periods == LOGGED_AFTER:
            _log.error(
                "the reactor on core %d (thread %d) stands still in '%s': no disk of that "
                "core is served",
                *(stats.core, stats.tid, stats.place),
            )

    async def run(self) -> None:
        """Look every period until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.check()
