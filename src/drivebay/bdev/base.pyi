from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from drivebay.bdev.histogram import Histogram, Layout
from drivebay.bdev.sampling import Sampler
from drivebay.reactor.mailbox import Answer
from drivebay.reactor.reactor import Reactor

OPERATIONS: tuple[str, ...]

class OpStats(NamedTuple):
    ops: int
    bytes: int
    errors: int
    latency_ticks: int
    max_latency_ticks: int
    min_latency_ticks: int

class Channel:
    """One reactor's way into one bdev. From Bdev.get_channel()."""

    bdev: Bdev
    reactor: Reactor

    def activate(self) -> Answer:
        """Bring it to life on its reactor; before the first I/O. Cannot fail."""

    def gate(self) -> Answer:
        """Hold back new I/O; answered when none is in flight (the quiesce primitive)."""

    def ungate(self) -> Answer:
        """Let held I/O go on."""

    def set_base(self, index: int, channel: Channel | None) -> Answer:
        """Use another channel for base ``index``, or none.

        Answered when no I/O of this channel is in flight on the old one. Only of a module
        whose bases come and go (raid).
        """

    def remove(self) -> Answer:
        """Hot remove: held and new I/O fail; answered when none is in flight."""

    def close(self) -> Answer:
        """Take it off its reactor; answered when that has let go of it."""

    def limit(self, rates: tuple[int, int, int, int]) -> Answer:
        """Set the limits of Bdev.limit() here; answered when they hold."""

    def count_times(self, layout: Layout | None) -> Answer:
        """Begin a histogram, or end it; answered when the reactor has let go of the old one."""

    def stats(self) -> dict[str, OpStats]:
        """By operation: read, write, flush, unmap, write_zeroes."""

class Bdev:
    """What every block device has; modules subclass it. Context: control."""

    name: str
    uuid: UUID
    aliases: list[str]
    product_name: ClassVar[str]
    module: ClassVar[str]  # "malloc", "null", "aio" …
    block_size: int
    num_blocks: int
    readonly: bool
    bases: list[Bdev | None]
    write_cache: bool
    buffer_alignment: int
    io_types: frozenset[str]  # read write flush unmap write_zeroes reset

    @property
    def content_id(self) -> str:
        """Another one when the content is not what a guest saw under the same name before."""

    @property
    def volatile_content(self) -> bool:
        """Whether the content ends with the process."""

    def driver_specific(self) -> dict[str, Any]:
        """The module's own object in bdev_get_bdevs."""

    def save(self) -> tuple[str, dict[str, Any]] | None:
        """The RPC call that rebuilds it, or None."""

    def resize(self, num_blocks: int) -> None:
        """Set a new size; the caller checks, and tells who listens."""

    def open_channel(self, reactor: Reactor, *bases: Channel | None) -> Channel:
        """Allocate a channel on those of the bases. Blocking: a worker thread.

        Raises HostError.
        """

    def size_on_bases(self) -> int:
        """Blocks it has now that a base has another size."""

    def close(self) -> None:
        """Give everything back. Blocking. After all channels are closed."""

    rates: tuple[int, int, int, int] | None
    layout: Layout | None
    histogram_settings: dict[str, Any] | None
    sampler: Sampler | None
    queue_depth: int  # in its module, or waiting for its limits

    def limit(self, rates: tuple[int, int, int, int]) -> list[Answer]:
        """Have it do at most so many reads and writes a second, and so many bytes of both, of
        reads and of writes; 0: no limit. Returns: the answers of its reactors.
        """

    def count_times(self, layout: Layout | None) -> list[Answer]:
        """Begin to count how long requests take, in histograms; None: no more."""

    def times(self) -> Histogram:
        """The sum of its channels' histograms, closed ones included. Raises: HostError."""

    def iostat(self) -> dict[str, OpStats]:
        """Sums over all channels, closed ones included."""

    def reset_iostat(self, mode: str = "all") -> None:
        """Set counters to zero: all, the latencies' "maxmin", or the "error"s."""

Listener = Callable[[Bdev, str], Any]
