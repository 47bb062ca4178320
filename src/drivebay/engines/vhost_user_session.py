"""A driver's session with a target: memory and rings, over as many connections as it takes.

Context: control; every call blocks. The base of `VhostUserBlk`. When the target went away
with requests in flight, the next one is given the same memory, the same rings, and the
inflight region in which its predecessor kept which requests it had taken: it executes again
what was not answered, and nothing else (vhost-user, "Inflight I/O tracking").
Nothing that the target sends is trusted; the inflight region is kept for it, never read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from drivebay.engines.vhost_user_connection import Connection
from drivebay.engines.vhost_user_memory import GUEST_BASE, DriverMemory, QueueLayout
from drivebay.engines.vhost_user_queue import DriverQueue
from drivebay.errors import PeerError
from drivebay.wire.vhost_user import (
    INFLIGHT_BYTES,
    VHOST_USER_F_PROTOCOL_FEATURES,
    Inflight,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFile,
    VringState,
    pack_mem_table,
    pack_u64,
)
from drivebay.wire.virtio_blk import BlkFeature

__all__ = ["DriverSession", "eventfd_fired"]

# Where the memory lies in the imagined front end; ring addresses are of this kind.
USER_BASE: Final = 0x5500_0000_0000
# The base of a packed ring at its start: both wrap counters 1, both indices 0. QEMU, which
# cannot know more after a crash, sends it then too; the inflight region has the truth.
PACKED_BASE: Final = 0x8000_8000
_U16: Final = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class _Inflight:
    """The region that GET_INFLIGHT_FD brought; its descriptor belongs to the session."""

    fd: int
    payload: bytes


class DriverSession:
    """What a driver shares with a target. Not for several threads at once."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path = path
        self.queues: list[DriverQueue] = []
        self._timeout_s = timeout_s
        self._features = 0
        self._protocol = ProtocolFeature(0)
        self._layouts: list[QueueLayout] = []
        self._memory: DriverMemory | None = None
        self._inflight: _Inflight | None = None
        self._descriptors: list[int] = []
        self._kicks: list[int] = []
        self._calls: list[int] = []
        self._errors: list[int] = []
        self.connection = Connection(path, timeout_s)

    @property
    def protocol_features(self) -> list[str]:
        """Names of the negotiated vhost-user features."""
        return [str(feature.name) for feature in ProtocolFeature if feature in self._protocol]

    @property
    def packed(self) -> bool:
        """Are the rings packed?"""
        return self.has(BlkFeature.RING_PACKED)

    def has(self, feature: BlkFeature) -> bool:
        return bool(self._features >> feature & 1)

    def broken_queue(self) -> int | None:
        """Index of a queue that the target gave up, by its error eventfd."""
        for index, fd in enumerate(self._errors):
            if eventfd_fired(fd):
                return index
        return None

    def close(self) -> None:
        """Stop the queues, so that the target is done with our memory, and disconnect."""
        try:
            for index in range(len(self.queues)):
                self.connection.stop_vring(index)
        except PeerError:
            pass  # it has gone already, and the memory with it
        finally:
            self._release()

    # --- set-up

    def _create(self, layouts: Sequence[QueueLayout], hugepages: bool) -> None:
        """Memory, and queues in it, which outlive the target."""
        self._layouts = list(layouts)
        self._memory = DriverMemory(layouts[-1].end, hugepages=hugepages)
        event_idx = self.has(BlkFeature.RING_EVENT_IDX)
        for layout in layouts:
            for kept in (self._kicks, self._calls, self._errors):
                kept.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                self._descriptors.append(kept[-1])
            eventfds = self._kicks[-1], self._calls[-1]
            queue = DriverQueue(self._memory.map, layout, GUEST_BASE, event_idx, *eventfds)
            self.queues.append(queue)

    def _hand_over(self) -> None:
        """Give a target all of it, at the first time and after a crash, in QEMU's order."""
        assert self._memory is not None
        send = self.connection.send
        send(Request.SET_FEATURES, pack_u64(self._features))
        if ProtocolFeature.INFLIGHT_SHMFD in self._protocol:
            if self._inflight is None:
                self._inflight = self._ask_inflight()
            send(Request.SET_INFLIGHT_FD, self._inflight.payload, (self._inflight.fd,))
        region = MemoryRegion(GUEST_BASE, self._memory.size, USER_BASE, 0)
        send(Request.SET_MEM_TABLE, pack_mem_table((region,)), (self._memory.fd,))
        for index, layout in enumerate(self._layouts):
            self._hand_over_ring(index, layout)
        if self._features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for index in range(len(self._layouts)):
                send(Request.SET_VRING_ENABLE, VringState(index, 1).pack())

    def _hand_over_ring(self, index: int, layout: QueueLayout) -> None:
        send = self.connection.send
        send(Request.SET_VRING_NUM, VringState(index, layout.size).pack())
        send(Request.SET_VRING_BASE, VringState(index, self._vring_base(layout)).pack())
        places = (USER_BASE + at for at in (layout.desc, layout.used, layout.avail))
        send(Request.SET_VRING_ADDR, VringAddr(index, 0, *places).pack())
        for request, fds in (
            (Request.SET_VRING_ERR, self._errors),
            (Request.SET_VRING_CALL, self._calls),
            (Request.SET_VRING_KICK, self._kicks),
        ):
            send(request, VringFile(index, True).pack(), (fds[index],))

    def _vring_base(self, layout: QueueLayout) -> int:
        """As QEMU has it, which forgot after a crash what the target had taken: used.idx."""
        if layout.packed:
            return PACKED_BASE
        assert self._memory is not None
        return int(_U16.unpack_from(self._memory.map, layout.used + 2)[0])

    def _ask_inflight(self) -> _Inflight:
        """GET_INFLIGHT_FD: have the target make the region. Raises: PeerError, TargetGone."""
        queues, size = len(self._layouts), self._layouts[0].size
        asked = Inflight(0, 0, queues, size).pack(INFLIGHT_BYTES[-1])
        answer, fd = self.connection.ask_fd(Request.GET_INFLIGHT_FD, asked)
        if fd is not None:
            self._descriptors.append(fd)
        made = Inflight.parse(answer)
        if fd is None or made.mmap_size == 0:
            raise PeerError("the target makes no inflight region, though it offers to")
        region = Inflight(made.mmap_size, made.mmap_offset, queues, size)
        return _Inflight(fd, region.pack(INFLIGHT_BYTES[-1]))

    def _release(self) -> None:
        self.connection.close()
        self.queues.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def eventfd_fired(fd: int) -> bool:
    """Take what an eventfd has counted: was it anything?"""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
