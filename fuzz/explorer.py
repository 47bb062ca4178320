"""Runs a target on one input after another, and keeps those that made it do something new.

What is new is told by the target itself: it answers each input with the behaviours that it
saw (which sentence ended a session, why a ring was given up, which status bytes came back).
That serves where no compiler counts branches. The same seed tries the same inputs as long as
the target answers alike; the input at work is in a file at any time, so that it is at hand
even when the process dies.
"""

from __future__ import annotations

import faulthandler
import hashlib
import mmap
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

__all__ = ["HERE", "Explorer", "Target", "corpus_of"]

HERE = Path(__file__).parent
INPUT_BYTES = 2048
HANG_S = 60  # one input; the slowest takes milliseconds
FRESH_ONE_IN = 4  # inputs made of nothing, so that an exhausted corpus does not confine it


class Target(Protocol):
    """What is fuzzed."""

    name: str

    def run(self, data: bytes) -> frozenset[str]:
        """Do what the input says; returns what was seen. Raises when something is wrong."""

    def close(self) -> None: ...


def corpus_of(name: str) -> list[Path]:
    return sorted((HERE / "corpus" / name).iterdir())


class CurrentInput:
    """The input at work, in a file that outlives a crash of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.ftruncate(fd, INPUT_BYTES + 4)
        self._map = mmap.mmap(fd, INPUT_BYTES + 4)
        os.close(fd)

    def set(self, data: bytes) -> None:
        self._map[4 : 4 + len(data)] = data
        self._map[:4] = len(data).to_bytes(4, "little")

    @staticmethod
    def read(path: Path) -> bytes:
        content = path.read_bytes()
        return content[4 : 4 + int.from_bytes(content[:4], "little")]


class Explorer:
    """One run of one target."""

    def __init__(self, target: Target, seed: int, current: Path) -> None:
        self.target = target
        self.random = random.Random(f"{target.name} {seed}")
        self.executed = 0
        self.seen: set[str] = set()
        self.kept: list[bytes] = []
        self._current = CurrentInput(current)

    def try_one(self, data: bytes) -> bool:
        """True when it showed something that no input before it did."""
        data = data[:INPUT_BYTES]
        self._current.set(data)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        behaviours = self.target.run(data)
        faulthandler.cancel_dump_traceback_later()
        self.executed += 1
        new = behaviours - self.seen
        self.seen |= new
        if new:
            self.kept.append(data)
        return bool(new)

    def replay(self, inputs: Iterable[bytes]) -> None:
        for data in inputs:
            self.try_one(data)

    def explore(self, seconds: float, inputs: int | None = None) -> None:
        """New inputs until the time is over, or so many."""
        deadline = time.monotonic() + seconds
        last = None if inputs is None else self.executed + inputs
        while time.monotonic() < deadline and self.executed != last:
            self.try_one(self.next_input())

    def next_input(self) -> bytes:
        rng = self.random
        if not self.kept or rng.randrange(FRESH_ONE_IN) == 0:
            return rng.randbytes(rng.choice((64, 256, 1024, INPUT_BYTES)))
        data = bytearray(rng.choice(self.kept))
        for _ in range(1 << rng.randrange(5)):
            self._mutate(data)
        return bytes(data)

    def _mutate(self, data: bytearray) -> None:
        rng = self.random
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))])
            case 2:
                data[at:at] = rng.randbytes(1 + rng.randrange(8))
            case 3:
                del data[at : at + 1 + rng.randrange(8)]
            case 4:  # a piece of another one
                other = rng.choice(self.kept)
                start = rng.randrange(len(other) + 1)
                data[at : at + 32] = other[start : start + 32]
            case _:  # a piece of its own once more
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + 32]


def save_input(data: bytes, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path
