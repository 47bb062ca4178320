from collections.abc import Sequence
from typing import TypedDict

from drivebay.engines.vhost_user_histogram import Histogram
from drivebay.engines.vhost_user_queue import DriverQueue

class Counters(TypedDict):
    inflight: int
    elapsed_ticks: int
    batches: int  # polls that found completions
    broken_ring: bool
    reads: int
    writes: int
    flushes: int
    errors: dict[int, int]  # by status byte; 255 = not written
    verified: int  # blocks
    mismatches: int  # blocks

class Mismatch(TypedDict):
    address: int  # of the wrong word, in bytes
    expected: int
    got: int
    sequence: int  # expected sequence of its block; 0 = not known
    word: int  # which word of its sector

class Load:
    """One workload over queues of one device."""

    latency: list[Histogram]  # of reads, writes and flushes, in ticks

    def __init__(
        self,
        queues: Sequence[DriverQueue],
        *,
        first_sector: int,
        num_blocks: int,
        block_bytes: int,
        random: bool,
        read_share: int,
        flush_every: int,
        verify: bool,
        self_check: bool,
        run: int,
    ) -> None:
        """``read_share`` of 65,536 requests read; all slots of each queue are used.

        ``num_blocks`` must be at least the slots of all queues together.
        Raises: UsageError for a block that does not fit a slot, MemoryError.
        """

    def run(
        self,
        duration_ticks: int,
        interval_ticks: float,
        gather_ticks: int,
        ns_per_tick: float = 0.0,
    ) -> None:
        """Run the workload. Blocks without the GIL; ``interval_ticks`` 0 is the closed loop.

        ``gather_ticks`` is the longest wait for more completions at once; 0 = never wait.
        With ``ns_per_tick`` the loop sleeps until the target calls; 0 = it polls.
        """

    def reread(self) -> None:
        """Read every block of known content once and check it; latencies begin anew."""

    def stop(self) -> None:
        """Take no new requests. Context: any thread."""

    def abandon(self) -> None:
        """End at once, whatever is in flight. Context: any thread."""

    @property
    def completions(self) -> int: ...
    @property
    def inflight(self) -> int: ...
    def counters(self) -> Counters:
        """What was counted, after run() or reread()."""

    def first_mismatch(self) -> Mismatch | None: ...

def tick_rate() -> float:
    """Ticks of the processor's clock in a second; takes 20 ms to measure."""
