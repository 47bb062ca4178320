"""Says which reactor stands still, and where.

Context: control, a few times a second. A reactor that neither sleeps nor turns its loop serves
no guest; somebody must be told which call it is stuck in. Each standstill is logged once,
and once more when it is over; the last ones are kept for a support bundle. One kind is
ended here: a guest's call eventfd whose other holder filled it and made it blocking, while
the reactor writes to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivebay.reactor.reactor import Reactor, ReactorStats

__all__ = ["Standstill", "Watchdog"]

_log = logging.getLogger(__name__)

PERIOD_S = 0.25
LOGGED_AFTER = 4  # periods: what is over sooner is no news
NOTIFYING = "notifying a guest"
KEPT = 64  # standstills that are remembered


@dataclass
class Standstill:
    """One time that a reactor stood still, by the clock of the wall."""

    core: int
    tid: int
    place: str  # what it was doing when last seen still
    began: float
    seconds: float  # so far, in whole periods
    rescued: bool  # it was stuck in a guest's call eventfd, and was freed
    over: bool


class Watchdog:
    """Compares what the reactors count with what they counted a period ago."""

    def __init__(self, reactors: Sequence[Reactor]) -> None:
        self._reactors = reactors
        self._loops: dict[int, int] = {}
        self._still: dict[int, int] = {}  # core: for how many periods
        self._current: dict[int, Standstill] = {}
        self.history: deque[Standstill] = deque(maxlen=KEPT)

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
        if core in self._current:
            self._current.pop(core).over = True
        if self._still.pop(core, 0) >= LOGGED_AFTER:
            _log.info("the reactor on core %d moves again", core)

    def _stands_still(self, reactor: Reactor, stats: ReactorStats) -> None:
        periods = self._still[stats.core] = self._still.get(stats.core, 0) + 1
        rescued = stats.place == NOTIFYING and bool(reactor.rescue())
        self._remember(stats, periods, rescued)
        if periods == LOGGED_AFTER:
            _log.error(
                "the reactor on core %d (thread %d) stands still in '%s': no disk of that "
                "core is served",
                *(stats.core, stats.tid, stats.place),
            )

    def _remember(self, stats: ReactorStats, periods: int, rescued: bool) -> None:
        if rescued or periods == LOGGED_AFTER:
            self._begin(stats, periods)
        found = self._current.get(stats.core)
        if found is not None:
            found.place, found.seconds = stats.place, periods * PERIOD_S
            found.rescued |= rescued

    def _begin(self, stats: ReactorStats, periods: int) -> None:
        if stats.core not in self._current:
            began = time.time() - periods * PERIOD_S
            found = Standstill(stats.core, stats.tid, stats.place, began, 0.0, False, False)
            self._current[stats.core] = found
            self.history.append(found)

    async def run(self) -> None:
        """Look every period until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.check()
