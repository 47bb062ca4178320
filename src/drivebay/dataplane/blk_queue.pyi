from collections.abc import Callable
from typing import NamedTuple

from drivebay.bdev.base import Channel
from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.dataplane.inflight import InflightQueue
from drivebay.memory.guest_memory import MemoryTable
from drivebay.reactor.mailbox import Answer

class QueueCounters(NamedTuple):
    requests: int
    notifications: int
    bad_requests: int
    inflight: int
    polls: int
    busy_polls: int  # those that found work
    busy_ticks: int  # of them, and of engines for it
    armed: bool

class RingArea(NamedTuple):
    """One of the three areas of a ring in guest memory."""

    name: str
    length: int
    alignment: int

def ring_areas(size: int, packed: bool) -> tuple[RingArea, RingArea, RingArea]:
    """Descriptors, the driver's area, the device's (virtio 1.3 §2.7, §2.8.10.1)."""

class BlkQueue:
    """One virtqueue of a virtio-blk device, served by one reactor.

    Context: control. The queue borrows the descriptors it is given: keep them
    open until stop() was answered. Every ``-> Answer`` below is done when the
    reactor has acted; before start() and after stop() it is done at once.
    """

    index: int

    def __init__(
        self,
        channel: Channel,
        table: MemoryTable,
        *,
        index: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        base: int,
        features: int,
        readonly: bool,
        write_through: bool,
        serial: bytes,
        on_broken: Callable[[BlkQueue], None],
        inflight: InflightQueue | None = None,
    ) -> None:
        """Bind the rings; ``desc``, ``avail``, ``used`` are front-end user addresses of the
        descriptors, the driver's area and the device's.

        Bit 34 of ``features`` (VIRTIO_F_RING_PACKED) makes the ring packed. ``base`` is
        where to go on, as VHOST_USER_SET_VRING_BASE says it: for a split ring the next avail
        index, free-running in 16 bits; for a packed one bits 0-14 the avail index, 15 its
        wrap counter, 16-30 the used index, 31 its wrap counter.

        With ``inflight``, what it says was taken and not answered is submitted again, in
        order, before anything new; where to go on then follows from it, and ``base`` counts
        only while the region is new.

        Raises: PeerError for a size, address or base that the specification forbids
        (virtio 1.3 §2.7, §2.8), naming the value; or for nonsense in ``inflight``.
        """

    def start(self, kick: int, call: int, err: int) -> Answer:
        """Serve it on the channel's reactor; -1 for a descriptor that is not there.

        The ring is looked at once without a kick. ``kick`` -1 polls for ever.
        """

    def stop(self) -> Answer:
        """Take nothing more and drain; answers with the base to go on from, as in __init__.

        Never reset by stopping (VHOST_USER_GET_VRING_BASE).
        """

    def set_enabled(self, enabled: bool) -> Answer:
        """A disabled queue takes nothing new (VHOST_USER_SET_VRING_ENABLE)."""

    def set_table(self, table: MemoryTable) -> Answer:
        """Switch memory; done when no request of an older table is in flight."""

    def set_notifiers(self, kick: int, call: int, err: int) -> Answer:
        """Replace descriptors; done when the old ones are used no more."""

    def set_write_through(self, write_through: bool) -> Answer:
        """virtio-blk writeback = 0: writes are stable before they complete."""

    def set_coalescing(self, delay_base_us: int, iops_threshold: int) -> Answer:
        """Notify less often above a rate; a base of 0 switches it off. What is owed is sent."""

    def set_log(self, log: DirtyLog | None, rings: bool) -> Answer:
        """Mark the pages that are written from now on, those of the ring itself if ``rings``;
        None ends it. Done when the former log is used no more.
        """

    @property
    def broken(self) -> str | None:
        """Why the ring was given up, or None."""

    def counters(self) -> QueueCounters: ...
