"""What front ends did wrong, logged at a limited rate.

Context: control. A front end that connects and misbehaves in a loop must not
fill the disk with log lines: beyond a burst, sentences are only counted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

__all__ = ["Complaints"]

BURST: Final = 20
WINDOW_S: Final = 10.0


class Complaints:
    """One controller's complaints."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
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
            self._log.warning("%d more sentences like these were left out", self.suppressed)
            self.suppressed = 0
        self._log.warning("%s", sentence)
