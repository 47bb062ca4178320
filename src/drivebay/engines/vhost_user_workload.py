"""Load on a vhost-user-blk target: what to run, how it is watched, what came out.

Context: control. The loop itself (vhost_user_load) runs in a thread of its own,
pinned to one core; the calling thread sleeps, and looks ten times a second
whether the target is still there and completes requests. With ``reconnect_s`` it goes
back to a target that went away, while the loop waits for what is in flight.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from drivebay.engines.vhost_user_client import VhostUserBlk, status_name
from drivebay.engines.vhost_user_connection import TargetGone
from drivebay.engines.vhost_user_histogram import Histogram
from drivebay.engines.vhost_user_load import Load, tick_rate
from drivebay.errors import DrivebayError, HostError, PeerError, UsageError
from drivebay.wire.virtio_blk import BlkFeature

if TYPE_CHECKING:
    from drivebay.engines.vhost_user_load import Counters, Mismatch

__all__ = ["RECONNECT_S", "Latency", "LoadParams", "LoadResult", "Workload", "run_load"]

CHECK_S: Final = 0.1
STALL_S: Final = 10.0
RECONNECT_S: Final = 30.0
GATHER_S: Final = 5e-6
MAX_BLOCK_BYTES: Final = 16 << 20
MAX_RUNTIME_S: Final = 1e7
MAX_RATE: Final = 1e9
_KIND_NAMES: Final = ("read", "write", "flush")  # as vhost_user_load.pxd numbers them
_WORD_NAMES: Final = ("magic", "address", "sequence", "run")


class Workload(Enum):
    """The workloads, by the names that fio gives them."""

    READ = "read"
    WRITE = "write"
    RANDREAD = "randread"
    RANDWRITE = "randwrite"
    RANDRW = "randrw"

    @property
    def random(self) -> bool:
        return self.value.startswith("rand")

    @property
    def writes(self) -> bool:
        return self not in (Workload.READ, Workload.RANDREAD)


@dataclass(frozen=True, slots=True)
class LoadParams:
    """One load. Sizes in bytes; ``rate`` in requests a second over all queues."""

    socket: str
    workload: Workload = Workload.RANDREAD
    block_bytes: int = 4096
    depth: int = 32
    queues: int = 1
    runtime_s: float = 5.0
    rate: float | None = None  # None: closed loop, as fast as the target can
    read_percent: int = 50  # of randrw
    offset: int = 0
    size: int | None = None  # None: to the end of the disk
    fsync: int = 0  # a FLUSH after so many writes of a queue; 0 = never
    verify: bool = False
    core: int | None = None  # None: the last one that this process may use
    hugepages: bool = False
    write_cache: bool | None = None  # None: as the target has it
    interrupts: bool = False  # sleep until the target calls, as a guest does; else poll
    indirect: bool = True  # in a packed ring: entries point to their descriptors
    reconnect_s: float | None = None  # how long to wait for a target that went away; None: end


@dataclass(frozen=True, slots=True)
class Latency:
    """In microseconds; percentiles are right to 1.6 %, mean and maximum are exact."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float

    @classmethod
    def of(cls, histogram: Histogram, ticks_per_us: float) -> Latency:
        p50, p90, p99, p99_9 = (
            histogram.percentile(percent) / ticks_per_us for percent in (50, 90, 99, 99.9)
        )
        return cls(
            histogram.count,
            histogram.mean / ticks_per_us,
            p50,
            p90,
            p99,
            p99_9,
            histogram.max / ticks_per_us,
        )


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load measured, and on what."""

    params: LoadParams
    features: list[str]
    protocol_features: list[str]
    write_cache: bool
    queue_size: int
    packed: bool
    capacity_bytes: int
    core: int
    seconds: float
    iops: float
    bytes_per_s: float
    reads: int
    writes: int
    flushes: int
    latency_us: Latency
    by_kind_us: dict[str, Latency]
    kicks: int
    completions_per_poll: float
    errors: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    reconnects: int = 0
    verified_blocks: int = 0
    mismatched_blocks: int = 0
    first_mismatch: str | None = None

    @property
    def failed(self) -> bool:
        return bool(self.errors or self.mismatched_blocks)

    def as_json(self) -> dict[str, Any]:
        """The result as plain objects."""
        document = asdict(self)
        document["params"]["workload"] = self.params.workload.value
        return document


def run_load(params: LoadParams, ended: threading.Event | None = None) -> LoadResult:
    """Open a session, run the load, and close it; Ctrl-C ends it early, with a result.

    Another thread ends it by ``ended``; then what it wrote is still read back and verified.

    Raises: UsageError, HostError, PeerError; TargetGone when the target closes the
    socket, or completes nothing for 10 s while requests are outstanding.
    """
    core = _choose_core(params.core)
    _check_params(params)
    with VhostUserBlk(
        params.socket,
        queues=params.queues,
        slots=params.depth,
        slot_bytes=params.block_bytes,
        hugepages=params.hugepages,
        indirect=params.indirect,
        keep_inflight=params.reconnect_s is not None,
    ) as disk:
        if params.write_cache is not None:
            disk.set_write_cache(params.write_cache)
        return _Run(disk, params, core).measure(ended or threading.Event())


def _choose_core(core: int | None) -> int:
    allowed = sorted(os.sched_getaffinity(0))
    if core is None:
        return allowed[-1]
    if core not in allowed:
        raise UsageError(
            f"core {core} cannot be used (this process may use {', '.join(map(str, allowed))})",
            field="core",
        )
    return core


def _check_params(params: LoadParams) -> None:
    if params.block_bytes % 512 or not 512 <= params.block_bytes <= MAX_BLOCK_BYTES:
        raise UsageError(
            f"a block of {params.block_bytes} bytes (must be whole sectors of 512, "
            f"at most {MAX_BLOCK_BYTES >> 20} MiB)",
            field="bs",
        )
    for name, value in (("depth", params.depth), ("queues", params.queues)):
        if value < 1:
            raise UsageError(f"{name} {value} (must be at least 1)", field=name)
    if not 0 < params.runtime_s <= MAX_RUNTIME_S:
        raise UsageError(
            f"a runtime of {params.runtime_s} s (must be above 0, at most {MAX_RUNTIME_S:g})",
            field="runtime",
        )
    if params.rate is not None and not 0 < params.rate <= MAX_RATE:
        raise UsageError(
            f"a rate of {params.rate} (must be above 0, at most {MAX_RATE:g})", field="rate"
        )
    for name, value in (("fsync", params.fsync), ("offset", params.offset)):
        if not 0 <= value < 1 << 63:
            raise UsageError(f"{name} {value} is out of range", field=name)
    if params.reconnect_s is not None and not 0 < params.reconnect_s <= MAX_RUNTIME_S:
        raise UsageError(
            f"{params.reconnect_s} s to reconnect (must be above 0)", field="reconnect"
        )
    if not 0 <= params.read_percent <= 100:
        raise UsageError(f"{params.read_percent} % reads (must be 0 to 100)", field="rwmixread")


class _Run:
    """One load on an open session."""

    def __init__(self, disk: VhostUserBlk, params: LoadParams, core: int) -> None:
        self.disk = disk
        self.params = params
        self.core = core
        self.ctrl_cs = 0
        self.reconnects = 0
        share = 0 if params.workload.writes else 100
        if params.workload is Workload.RANDRW:
            share = params.read_percent
        blocks = self._num_blocks()
        try:
            self.load = self._prepare(blocks, share)
        except MemoryError as error:
            raise HostError(
                f"cannot keep the sequences of {blocks} blocks",
                errno.ENOMEM,
                hint="limit the range with --size",
            ) from error

    def _prepare(self, blocks: int, share: int) -> Load:
        params = self.params
        return Load(
            self.disk.queues,
            first_sector=params.offset // 512,
            num_blocks=blocks,
            block_bytes=params.block_bytes,
            random=params.workload.random,
            read_share=share * 65536 // 100,
            flush_every=min(params.fsync, 0xFFFF_FFFF),
            verify=params.verify,
            self_check=not params.workload.writes,
            run=secrets.randbits(64),
        )

    def _num_blocks(self) -> int:
        """How many blocks the range holds. Raises: UsageError when it does not suit the disk."""
        params, disk = self.params, self.disk
        if params.workload.writes and disk.has(BlkFeature.RO):
            raise UsageError(f"'{disk.path}' is read-only", field="rw", hint="use --rw randread")
        if params.fsync and not disk.has(BlkFeature.FLUSH):
            raise UsageError(f"'{disk.path}' offers no flush", field="fsync")
        if params.block_bytes % disk.block_size:
            raise UsageError(
                f"blocks of {params.block_bytes} bytes on a disk with {disk.block_size}",
                field="bs",
                hint=f"use --bs {disk.block_size} or a multiple",
            )
        size = disk.capacity_bytes - params.offset if params.size is None else params.size
        if params.offset % disk.block_size or params.offset + size > disk.capacity_bytes:
            raise UsageError(
                f"the range from {params.offset} of {size} bytes does not suit the disk "
                f"(it has {disk.capacity_bytes} bytes in blocks of {disk.block_size})",
                field="offset",
            )
        blocks = size // params.block_bytes
        needed = params.depth * params.queues if params.verify else 1
        if blocks < needed:
            raise UsageError(
                f"the range holds {max(blocks, 0)} blocks (at least {needed} are needed, "
                f"one for each request in flight)",
                field="size",
            )
        return blocks

    def measure(self, ended: threading.Event) -> LoadResult:
        """Run the load, and with --verify read back all that it wrote."""
        ticks_per_s = tick_rate()
        duration = int(self.params.runtime_s * ticks_per_s)
        if self.params.rate is None:
            interval, gather = 0.0, int(GATHER_S * ticks_per_s)
        else:
            interval, gather = ticks_per_s / self.params.rate, 0
        ns_per_tick = 1e9 / ticks_per_s if self.params.interrupts else 0.0
        with self._ctrl_c_noted():
            self._watch(lambda: self.load.run(duration, interval, gather, ns_per_tick), ended)
            latency = self.load.latency
            counters = self.load.counters()
            kicks = sum(queue.kicks for queue in self.disk.queues)
            if self.params.verify and self.params.workload.writes and not self.ctrl_cs:
                self._watch(self.load.reread, threading.Event())
        return self._result(ticks_per_s, counters, latency, kicks)

    @contextmanager
    def _ctrl_c_noted(self) -> Iterator[None]:
        """Let Ctrl-C end the load, instead of raising: the first waits for what is in flight.

        KeyboardInterrupt can strike between any two lines, the start of the thread
        among them, and would leave the loop running with nobody to end it.
        """

        def note(_number: int, _frame: object) -> None:
            self.ctrl_cs += 1
            self.load.stop()
            if self._gives_up():
                self.load.abandon()

        raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not raises or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _gives_up(self) -> bool:
        return self.ctrl_cs > 1

    def _watch(self, work: Callable[[], None], ended: threading.Event) -> None:
        """Run the loop in its thread, and end it when the target is lost or stalls."""
        thread = threading.Thread(target=self._pinned, args=(work,), name="bench")
        thread.start()
        seen, seen_at = -1, time.monotonic()
        trouble: DrivebayError | None = None
        while thread.is_alive():
            thread.join(CHECK_S)
            if ended.is_set():
                self.load.stop()
            now = time.monotonic()
            if self.load.completions != seen or self.load.inflight == 0:
                seen, seen_at = self.load.completions, now
            within_s = self.params.reconnect_s
            if trouble is None and within_s is not None and self.disk.connection.gone():
                trouble = self._come_back(within_s)
                seen_at = time.monotonic()
            trouble = trouble or self._trouble(now - seen_at)
            if trouble is not None:
                self.load.abandon()
        if self.load.counters()["broken_ring"]:
            raise PeerError(
                f"'{self.disk.path}' gave back a request that it does not hold: "
                "its used ring is wrong"
            )
        if trouble is not None and not self._gives_up():
            raise trouble

    def _pinned(self, work: Callable[[], None]) -> None:
        os.sched_setaffinity(0, {self.core})  # of this thread only
        work()

    def _come_back(self, within_s: float) -> DrivebayError | None:
        """Go back to the target with what is in flight; returns why that failed."""
        try:
            self.disk.reconnect(within_s, self._gives_up)
        except DrivebayError as error:
            return error
        self.reconnects += 1
        return None

    def _trouble(self, quiet_s: float) -> PeerError | None:
        outstanding = f"{self.load.inflight} requests outstanding"
        after = f"after {self.load.completions} completions"
        if self.disk.connection.gone():
            return TargetGone(
                f"the target closed '{self.disk.path}' with {outstanding}, {after}",
                hint="the target's log says why",
            )
        broken = self.disk.broken_queue()
        if broken is not None:
            return PeerError(
                f"the target gave up queue {broken} with {outstanding}, {after}",
                hint="the target's log says why",
            )
        if quiet_s > STALL_S:
            return TargetGone(
                f"'{self.disk.path}' completed nothing for {STALL_S:g} s "
                f"with {outstanding}, {after}"
            )
        return None

    def _result(
        self, ticks_per_s: float, counters: Counters, latency: list[Histogram], kicks: int
    ) -> LoadResult:
        """Figures are those of the load; verification counts its own reading back too."""
        ticks_per_us = ticks_per_s / 1e6
        seconds = max(counters["elapsed_ticks"] / ticks_per_s, 1e-9)
        transfers = counters["reads"] + counters["writes"]
        total = Histogram()
        for histogram in latency:
            total.add(histogram)
        final = self.load.counters()
        return LoadResult(
            params=self.params,
            features=self.disk.features,
            protocol_features=self.disk.protocol_features,
            write_cache=self.disk.write_cache,
            queue_size=self.disk.queue_size,
            packed=self.disk.packed,
            capacity_bytes=self.disk.capacity_bytes,
            core=self.core,
            seconds=seconds,
            iops=transfers / seconds,
            bytes_per_s=transfers * self.params.block_bytes / seconds,
            reads=counters["reads"],
            writes=counters["writes"],
            flushes=counters["flushes"],
            latency_us=Latency.of(total, ticks_per_us),
            by_kind_us={
                name: Latency.of(histogram, ticks_per_us)
                for name, histogram in zip(_KIND_NAMES, latency, strict=True)
                if histogram.count
            },
            kicks=kicks,
            completions_per_poll=total.count / max(counters["batches"], 1),
            errors={status_name(status): n for status, n in final["errors"].items()},
            interrupted=self.ctrl_cs > 0,
            reconnects=self.reconnects,
            verified_blocks=final["verified"],
            mismatched_blocks=final["mismatches"],
            first_mismatch=_mismatch_text(self.load.first_mismatch()),
        )


def _mismatch_text(mismatch: Mismatch | None) -> str | None:
    if mismatch is None:
        return None
    word, at = mismatch["word"], mismatch["address"]
    what = _WORD_NAMES[word] if word < len(_WORD_NAMES) else f"pattern word {word}"
    known = f" of write {mismatch['sequence']}" if mismatch["sequence"] else ""
    return (
        f"offset {at} (sector {at // 512}), {what}{known}: "
        f"expected {mismatch['expected']:#x}, got {mismatch['got']:#x}"
    )
