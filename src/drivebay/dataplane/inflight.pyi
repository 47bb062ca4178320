from collections.abc import Callable
from typing import Final

INFLIGHT_TAIL_BYTES: Final[int]
INFLIGHT_ALIGNMENT: Final[int]

def inflight_queue_bytes(queue_size: int, packed: bool) -> int:
    """What one queue takes in a region."""

class InflightQueue:
    """One queue's part of a region, for the ``inflight`` of a BlkQueue. Used once."""

    index: int

class InflightRegion:
    """A front end's inflight region, mapped (vhost-user, "Inflight I/O tracking").

    Context: control or a worker thread; mapping can take milliseconds. Behind the queues
    there may be a tail of INFLIGHT_TAIL_BYTES that is the target's own.
    """

    num_queues: int
    queue_size: int
    packed: bool
    has_tail: bool

    def __init__(
        self,
        *,
        fd: int,
        mmap_size: int,
        mmap_offset: int,
        num_queues: int,
        queue_size: int,
        packed: bool,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """Map it; the descriptor is borrowed. ``on_broken``: as of a MemoryTable.

        Raises: PeerError, naming what does not fit; HostError when mmap fails.
        """

    def queue(self, index: int) -> InflightQueue:
        """Raises: PeerError when the region has no such queue."""

    @property
    def tail_at(self) -> int:
        """Where the tail begins, from the start of the region."""

    def read_tail(self) -> bytes: ...
    def write_tail(self, data: bytes, offset: int = 0) -> None: ...
    @property
    def broken(self) -> bool: ...
    def release(self) -> None:
        """Unmap it, when no queue uses it any more."""
