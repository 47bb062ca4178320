"""A progress bar for what takes longer than a second; nothing without a terminal.

Context: a short-lived process. The bar is one line on standard error that is drawn over
itself; it is gone when the work is done.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

__all__ = ["Phases", "Progress", "print_line", "watch"]

_QUIET_S = 1.0
_EVERY_S = 0.1
_WIDTH = 30


class Progress:
    """One bar; ``update`` may be called as often as one likes."""

    def __init__(
        self,
        what: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began = clock()
        self._drawn_at: float | None = None

    def update(self, done: int, total: int) -> None:
        """Draw the bar if a second has passed and the last drawing is old enough."""
        now = self._clock()
        if not self._stream.isatty() or now - self._began < _QUIET_S:
            return
        if self._drawn_at is not None and now - self._drawn_at < _EVERY_S:
            return
        self._drawn_at = now
        share = min(done / total, 1.0) if total else 1.0
        filled = round(share * _WIDTH)
        bar = "#" * filled + "." * (_WIDTH - filled)
        self._stream.write(f"\r{self._what} [{bar}] {share:4.0%}{self._left(now, share)}\x1b[K")
        self._stream.flush()

    def _left(self, now: float, share: float) -> str:
        """Time that is left at the pace so far; it means little at the very beginning."""
        if share < 0.01:
            return ""
        seconds = round((now - self._began) * (1 - share) / share)
        return f"  {seconds // 60}:{seconds % 60:02} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn_at is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Phases:
    """A bar for each part of a work, whoever does it says which: ``phases(what, done, total)``."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw the bar of this part; that of the part before is taken away."""
        if self._bar is None or what != self._what:
            self.close()
            self._what, self._bar = what, Progress(what)
        self._bar.update(done, total)

    def close(self) -> None:
        """Take the last bar away."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def print_line(line: str) -> None:
    """Say on standard error what is done now."""
    print(line, file=sys.stderr, flush=True)


def watch(what: str, work: Callable[[], object], look: Callable[[], tuple[int, int]]) -> None:
    """Run ``work`` in a thread and show how far it is, as ``look`` says: (done, total).

    Raises: what ``work`` raises. ``look`` is called in the calling thread.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            failure.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(_QUIET_S)
    with Progress(what) as bar:
        while worker.is_alive():
            bar.update(*look())
            worker.join(_EVERY_S)
    if failure:
        raise failure[0]
