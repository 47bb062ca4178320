"""One ring of a session: what the front end said about it, and the queue that serves it.

Context: control, only from the session that owns it. A ring has two switches:
it is *started* from SET_VRING_KICK (once its size and addresses are there) to
GET_VRING_BASE, and it is *enabled* or not. A started ring has a BlkQueue on a
reactor, except while the memory that it lies in is away: then it is suspended,
and goes on where it was when the memory is back.

The descriptors belong to the ring. A queue borrows them, so one that was
replaced is closed only after the reactor has let go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from drivebay.bdev.base import Channel
from drivebay.dataplane.blk_queue import BlkQueue, ring_areas
from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.dataplane.inflight import InflightQueue
from drivebay.errors import PeerError
from drivebay.memory.guest_memory import MemoryTable
from drivebay.reactor.mailbox import Answer
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.descriptors import close_all
from drivebay.wire.vhost_user import VringAddr
from drivebay.wire.virtio_blk import BlkFeature

__all__ = ["MAX_RING_SIZE", "Coalescing", "DeviceTerms", "Ring"]

MAX_RING_SIZE: Final = 1024  # the data plane's own limit; virtio allows 32,768

# Both indexes 0, both wrap counters 1 (virtio 1.3 §2.8.1), as SET_VRING_BASE would say it.
_PACKED_START: Final = 0x8000_8000


class Coalescing(NamedTuple):
    """When a guest is told less often of what completed; a base of 0 is never."""

    delay_base_us: int = 0
    iops_threshold: int = 60000


@dataclass(frozen=True, slots=True)
class DeviceTerms:
    """What a queue must know of the device, as negotiated when its ring starts."""

    features: int
    readonly: bool
    write_through: bool
    serial: bytes
    coalescing: Coalescing

    @property
    def packed(self) -> bool:
        return bool(self.features >> BlkFeature.RING_PACKED & 1)


class Ring:
    """Ring ``index`` of one session."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.addr: VringAddr | None = None
        self.base: int | None = None
        self.enabled = False
        self.kicked = False
        self.queue: BlkQueue | None = None
        self.reactor: Reactor | None = None  # that serves the queue, or did so last
        self._busy_ticks = 0  # of former queues
        self._stopping: Answer | None = None
        self._fds: dict[str, int] = {"kick": -1, "call": -1, "err": -1}
        self._retired: list[int] = []

    @property
    def started(self) -> bool:
        return self.kicked and self.addr is not None and self.size > 0

    @property
    def busy_ticks(self) -> int:
        """For how long reactors worked for it, since the session began."""
        now = self.queue.counters().busy_ticks if self.queue is not None else 0
        return self._busy_ticks + now

    # What the front end says ------------------------------------------------------------

    def set_size(self, size: int) -> None:
        """SET_VRING_NUM. Raises: PeerError."""
        if not 1 <= size <= MAX_RING_SIZE or size & (size - 1):
            raise PeerError(
                f"queue {self.index} has size {size} (must be a power of two, at most "
                f"{MAX_RING_SIZE})"
            )
        self.size = size

    def set_base(self, base: int, terms: DeviceTerms) -> None:
        """SET_VRING_BASE; a packed ring's is checked when its size is known. Raises: PeerError."""
        if base > 0xFFFF and not terms.packed:
            raise PeerError(f"queue {self.index} has base {base:#x} (a split ring's is 16 bits)")
        self.base = base

    def base_for(self, terms: DeviceTerms) -> int:
        """Where it stands: as told, or as it stopped, or where every ring begins."""
        if self.base is not None:
            return self.base
        return _PACKED_START if terms.packed else 0

    def set_addr(self, addr: VringAddr) -> None:
        """SET_VRING_ADDR. A started ring may hear its own addresses again. Raises: PeerError."""
        if self.started and self.addr is not None:
            told = (addr.desc, addr.avail, addr.used)
            if told != (self.addr.desc, self.addr.avail, self.addr.used):
                raise PeerError(
                    f"queue {self.index} got new addresses while started "
                    "(GET_VRING_BASE must stop it first)"
                )
        self.addr = addr

    def log_to(self, log: DirtyLog | None) -> list[Answer]:
        """Mark what is written in ``log``, and the ring's own writes if SET_VRING_ADDR says so.

        The ring is marked where it lies in guest memory; the address to log it at, which a
        front end says besides, differs only behind an IOMMU, and none is served.
        """
        if self.queue is None or self.addr is None:
            return []
        return [self.queue.set_log(log, self.addr.is_logged)]

    def replace_fd(self, role: str, fd: int) -> None:
        """Own ``fd`` as "kick", "call" or "err"; -1 for none. The former one is retired."""
        self._retired.append(self._fds[role])
        self._fds[role] = fd

    def notifiers_changed(self) -> list[Answer]:
        """Tell the queue, if there is one; close_retired() after the answer."""
        return [self.queue.set_notifiers(**self._fds)] if self.queue is not None else []

    def close_retired(self) -> None:
        close_all(self._retired)
        self._retired.clear()

    # Serving it -------------------------------------------------------------------------

    def check_place(self, table: MemoryTable, terms: DeviceTerms) -> None:
        """Make sure that the ring's three areas lie in guest memory. Raises: PeerError."""
        assert self.addr is not None
        addresses = (self.addr.desc, self.addr.avail, self.addr.used)
        for area, address in zip(ring_areas(self.size, terms.packed), addresses, strict=True):
            table.resolve_user(address, area.length, f"queue {self.index} {area.name}")

    def start(
        self,
        channel: Channel,
        table: MemoryTable,
        terms: DeviceTerms,
        on_broken: Callable[[BlkQueue], None],
        log: DirtyLog | None,
        inflight: InflightQueue | None,
    ) -> list[Answer]:
        """Bind the ring and serve it on the channel's reactor. Raises: PeerError.

        Where it goes on is told by ``inflight`` if that has been in use before, and not by the
        front end: one whose back end died does not know how far that had come.
        """
        assert self.queue is None
        assert self.addr is not None
        queue = BlkQueue(
            channel,
            table,
            index=self.index,
            size=self.size,
            desc=self.addr.desc,
            avail=self.addr.avail,
            used=self.addr.used,
            base=self.base_for(terms),
            features=terms.features,
            readonly=terms.readonly,
            write_through=terms.write_through,
            serial=terms.serial,
            on_broken=on_broken,
            inflight=inflight,
        )
        self.queue = queue
        self.reactor = channel.reactor
        queue.set_coalescing(*terms.coalescing)
        return [*self.log_to(log), queue.set_enabled(self.enabled), queue.start(**self._fds)]

    def set_enabled(self, enabled: bool) -> list[Answer]:
        """SET_VRING_ENABLE."""
        self.enabled = enabled
        return [self.queue.set_enabled(enabled)] if self.queue is not None else []

    def stop(self) -> list[Answer]:
        """Ask the queue to take nothing more and to drain; stopped() after the answer."""
        if self.queue is None:
            return []
        if self._stopping is None:
            self._stopping = self.queue.stop()
        return [self._stopping]

    def stopped(self) -> None:
        """Keep where it stopped: GET_VRING_BASE tells it, and never resets it."""
        if self._stopping is not None:
            self.base = self._stopping.result()
            self._stopping = None
            if self.queue is not None:
                self._busy_ticks += self.queue.counters().busy_ticks
            self.queue = None

    def forget(self) -> None:
        """After stopping: back to how a new session has it, but for call and err."""
        self.enabled = False
        self.addr = None
        self.size = 0
        self.base = None

    def drop_kick(self) -> None:
        """GET_VRING_BASE: the next start brings a kick of its own."""
        self.kicked = False
        self.replace_fd("kick", -1)
        self.close_retired()

    def close(self) -> None:
        """Close all descriptors; the queue is gone."""
        assert self.queue is None
        for role in self._fds:
            self.replace_fd(role, -1)
        self.close_retired()
