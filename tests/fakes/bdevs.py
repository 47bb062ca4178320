"""Bdevs and channels in plain Python that can be held up at each step of their lives.

Context: tests of the registry. An Event that is not set makes the step wait; ``steps`` is
what happened, in order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from typing import Any
from uuid import UUID, uuid4

PATIENCE_S = 10.0


class FakeReactor:
    """Something that channels belong to."""


class FakeAnswer:
    """An answer that comes when its event is set."""

    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[Any, None, int]:
        yield from self._event.wait().__await__()
        return 0


class FakeChannel:
    def __init__(self, bdev: FakeBdev, reactor: FakeReactor) -> None:
        self.bdev = bdev
        self.reactor = reactor

    def _step(self, name: str) -> FakeAnswer:
        self.bdev.steps.append(name)
        return FakeAnswer(self.bdev.gates[name])

    def activate(self) -> FakeAnswer:
        return self._step("activate")

    def remove(self) -> FakeAnswer:
        return self._step("remove")

    def close(self) -> FakeAnswer:
        return self._step("close")


class FakeBdev:
    """A bdev whose channel steps wait for ``gates`` and whose opening waits for ``may_open``."""

    module = "fake"
    product_name = "Fake disk"

    def __init__(self, name: str, uuid: UUID | None = None, num_blocks: int = 100) -> None:
        self.name = name
        self.uuid = uuid or uuid4()
        self.aliases: list[str] = []
        self.num_blocks = num_blocks
        self.bases: list[FakeBdev] = []
        self.block_size = 512
        self.steps: list[str] = []
        self.gates = {name: asyncio.Event() for name in ("activate", "remove", "close")}
        for gate in self.gates.values():
            gate.set()
        self.may_open = threading.Event()
        self.may_open.set()
        self.fails_to_open: Exception | None = None
        self.closed_by: str | None = None

    def open_channel(self, reactor: FakeReactor) -> FakeChannel:
        assert self.may_open.wait(PATIENCE_S)
        self.steps.append("open")
        if self.fails_to_open is not None:
            raise self.fails_to_open
        return FakeChannel(self, reactor)

    def resize(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def close(self) -> None:
        self.closed_by = threading.current_thread().name
        self.steps.append("bdev closed")
