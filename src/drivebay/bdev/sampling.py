"""How many requests a bdev has in work, looked at in regular intervals. Context: control."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev

__all__ = ["Sampler"]

# Control has other things to do; a look counts for the time since the one before.
_SHORTEST_S: Final = 0.001
_LONGEST_S: Final = 86400.0


class Sampler:
    """Runs until stop(), or until the bdev is ``present`` no more."""

    def __init__(self, bdev: Bdev, period_us: int, present: Callable[[], bool]) -> None:
        self.period_us = period_us
        self.queue_depth = 0
        self.io_time_us = 0  # with anything in work
        self.weighted_io_time_us = 0  # the same times the number of requests
        self._bdev = bdev
        self._present = present
        self._loop = asyncio.get_running_loop()
        self._looked_at = self._loop.time()
        self._timer = self._next()

    def _next(self) -> asyncio.TimerHandle:
        pause_s = min(max(self.period_us / 1e6, _SHORTEST_S), _LONGEST_S)
        return self._loop.call_later(pause_s, self._look)

    def _look(self) -> None:
        if not self._present():
            return
        now = self._loop.time()
        passed_us = round((now - self._looked_at) * 1e6)
        self._looked_at = now
        self.queue_depth = self._bdev.queue_depth
        if self.queue_depth:
            self.io_time_us += passed_us
            self.weighted_io_time_us += passed_us * self.queue_depth
        self._timer = self._next()

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()
