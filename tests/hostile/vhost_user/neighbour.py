"""A well-behaved guest beside the hostile ones: verified I/O without pause, in a thread.

Every block it writes says where it belongs and when it was written; every read checks that.
Context: hostile tests.
"""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

from tests.fakes.driver import Session
from tests.fakes.process import wait_until

BLOCK = 4096
BLOCKS = 256


class Neighbour:
    """Writes, reads and checks until told to stop."""

    def __init__(self, path: Path) -> None:
        self.session = Session(path, size=32)
        self.rounds = 0
        self.error: BaseException | None = None
        self._written = [0] * BLOCKS
        self._rng = random.Random(42)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbour")
        self._thread.start()

    def _run(self) -> None:
        try:
            # A pause of its own, so that the hostile side gets its share of two cores.
            while not self._stop.wait(0.0005):
                self._one_round()
                self.rounds += 1
        except (AssertionError, OSError, TimeoutError) as error:
            self.error = error

    def _one_round(self) -> None:
        disk = self.session.disk
        block = self._rng.randrange(BLOCKS)
        sequence = self._written[block] = self.rounds + 1
        disk.write(8 * block, content(block, sequence))
        other = self._rng.randrange(BLOCKS)
        for check in (block, other):
            found = disk.read(8 * check, BLOCK)
            expected = content(check, self._written[check])
            assert found == expected, f"block {check} holds {found[:16]!r}"

    def expect_progress(self, rounds: int = 20) -> None:
        """Wait until it did some more rounds, all of them right."""
        goal = self.rounds + rounds
        wait_until(
            lambda: self.error is not None or self.rounds >= goal,
            f"the neighbour's round {goal}, it is at {self.rounds}",
        )
        if self.error is not None:
            raise AssertionError(f"the neighbour noticed: {self.error!r}") from self.error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.session.close()


def content(block: int, sequence: int) -> bytes:
    if sequence == 0:
        return bytes(BLOCK)
    return struct.pack("<QQ", block, sequence) * (BLOCK // 16)
