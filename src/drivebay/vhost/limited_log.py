"""What front ends do, logged at a limited rate.

Context: control. A front end that connects in a loop, to misbehave or not, must
not fill the disk with log lines: beyond a burst, sentences are only counted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

__all__ = ["LimitedLog"]

BURST: Final = 20
WINDOW_S: Final = 10.0


class LimitedLog:
    """One controller's sentences of one level."""

    def __init__(self, log: logging.Logger, level: int) -> None:
        self._log = log
        self._level = level
        self._window_from_s = 0.0
        self._in_window = 0
        self.suppressed = 0

    def add(self, sentence: str) -> None:
        """Log it, or count it."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._window_from_s >= WINDOW_S:
            self._window_from_s = now_s
            self._in_window = 0
        self._in_window += 1
        if self._in_window > BURST:
            self.suppressed += 1
            return
        if self.suppressed:
            self._log.log(
                self._level, "%d more sentences like these were left out", self.suppressed
            )
            self.suppressed = 0
        self._log.log(self._level, "%s", sentence)
