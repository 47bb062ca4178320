"""A data plane whose answers a test holds in its hand.

It stands in for drivebay.dataplane and drivebay.bdev where a test needs what
the real ones do not do on purpose: a queue that will not drain, a reactor that
does not answer. It touches no ring. Context: tests; answers from any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple
from uuid import UUID


class FakeAnswer:
    """What a reactor will answer."""

    def __init__(self) -> None:
        self.done = False
        self._value = 0
        self._waiters: list[asyncio.Future[None]] = []

    def finish(self, value: int = 0) -> None:
        """Answer it. From the loop's thread."""
        self._value = value
        self.done = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def result(self) -> int:
        if not self.done:
            raise AssertionError("asked for an answer that is not there yet")
        return self._value

    def __await__(self) -> Generator[Any, None, int]:
        if not self.done:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            yield from waiter
        return self._value


class FakeReactor:
    def __init__(self, core: int) -> None:
        self.core = core


class FakeBdev:
    """The attributes of a bdev that the set-up plane reads."""

    product_name = "Fake disk"
    module = "fake"
    uuid = UUID(int=1)
    aliases: tuple[str, ...] = ()
    write_cache = True
    buffer_alignment = 1

    def __init__(
        self,
        name: str = "Fake0",
        *,
        block_size: int = 512,
        num_blocks: int = 2048,
        readonly: bool = False,
        io_types: frozenset[str] = frozenset({"read", "write", "flush", "unmap", "write_zeroes"}),
    ) -> None:
        self.name = name
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.readonly = readonly
        self.io_types = io_types
        self.content_id = f"fake {name}"
        self.volatile_content = False


class FakeChannel:
    def __init__(self, bdev: FakeBdev, reactor: FakeReactor) -> None:
        self.bdev = bdev
        self.reactor = reactor


class FakeCounters(NamedTuple):
    requests: int
    notifications: int
    bad_requests: int
    inflight: int
    polls: int = 0
    busy_polls: int = 0
    busy_ticks: int = 0
    armed: bool = False


class FakePlane:
    """Makes queues, remembers them, and holds the operations that a test named."""

    def __init__(self) -> None:
        self.queues: list[FakeQueue] = []
        self.hold: set[str] = set()
        self.held: list[tuple[str, FakeQueue, FakeAnswer, int]] = []
        self.changed = threading.Condition()

    def answer(self, operation: str, queue: FakeQueue, value: int = 0) -> FakeAnswer:
        answer = FakeAnswer()
        with self.changed:
            queue.calls.append(operation)
            if operation in self.hold:
                self.held.append((operation, queue, answer, value))
            else:
                answer.finish(value)
            self.changed.notify_all()
        return answer

    def wait_for(self, condition: Callable[[FakePlane], bool]) -> None:
        """From the test's thread."""
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self), timeout=20):
                raise AssertionError("the data plane was not asked for what the test waits for")

    def release(self) -> None:
        """Answer everything that is held. From the loop's thread."""
        with self.changed:
            self.hold.clear()
            held, self.held = self.held, []
        for _operation, _queue, answer, value in held:
            answer.finish(value)


class FakeQueue:
    """One queue of a FakePlane; its attributes are what it was made with."""

    def __init__(self, plane: FakePlane, channel: FakeChannel, table: Any, **terms: Any) -> None:
        self.plane = plane
        self.channel = channel
        self.table = table
        self.terms = terms
        self.index: int = terms["index"]
        self.stop_at: int = terms["base"]
        self.calls: list[str] = []
        self.enabled: bool | None = None
        self.write_through: bool = terms["write_through"]
        self.log: Any = None
        self.log_rings = False
        self.fds: dict[str, int] = {}
        self.running = False
        self.broken: str | None = None
        self.inflight = 0
        self.coalescing: tuple[int, int] | None = None
        with plane.changed:
            plane.queues.append(self)

    def start(self, kick: int, call: int, err: int) -> FakeAnswer:
        self.running = True
        self.fds = {"kick": kick, "call": call, "err": err}
        return self.plane.answer("start", self)

    def stop(self) -> FakeAnswer:
        self.running = False
        return self.plane.answer("stop", self, self.stop_at)

    def set_enabled(self, enabled: bool) -> FakeAnswer:
        self.enabled = enabled
        return self.plane.answer("set_enabled", self)

    def set_table(self, table: Any) -> FakeAnswer:
        self.table = table
        return self.plane.answer("set_table", self)

    def set_notifiers(self, kick: int, call: int, err: int) -> FakeAnswer:
        self.fds = {"kick": kick, "call": call, "err": err}
        return self.plane.answer("set_notifiers", self)

    def set_write_through(self, write_through: bool) -> FakeAnswer:
        self.write_through = write_through
        return self.plane.answer("set_write_through", self)

    def set_coalescing(self, delay_base_us: int, iops_threshold: int) -> FakeAnswer:
        self.coalescing = (delay_base_us, iops_threshold)
        return self.plane.answer("set_coalescing", self)

    def set_log(self, log: Any, rings: bool) -> FakeAnswer:
        self.log = log
        self.log_rings = rings
        return self.plane.answer("set_log", self)

    def break_ring(self, cause: str) -> None:
        """What the guest did. From the loop's thread."""
        self.broken = cause
        self.terms["on_broken"](self)

    def counters(self) -> FakeCounters:
        return FakeCounters(0, 0, 0, self.inflight)
