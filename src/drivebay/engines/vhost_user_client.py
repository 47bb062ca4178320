"""A vhost-user-blk initiator: the driver's side of any such target, without a guest.

Context: control; every call blocks. `VhostUserBlk` sets a session up and offers
single requests (tests, tools); load over the same queues is `vhost_user_workload`.
Nothing that the target sends is trusted.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from drivebay.engines.vhost_user_connection import Connection, TargetGone
from drivebay.engines.vhost_user_memory import GUEST_BASE, DriverMemory, QueueLayout
from drivebay.engines.vhost_user_queue import DriverQueue
from drivebay.errors import DrivebayError, PeerError, UsageError
from drivebay.wire.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFile,
    VringState,
    pack_mem_table,
    pack_u64,
)
from drivebay.wire.virtio_blk import (
    SECTOR_BYTES,
    WRITEBACK_OFFSET,
    BlkFeature,
    feature_mask,
)

__all__ = ["DiskConfig", "RequestFailed", "RequestType", "VhostUserBlk"]

# Where the memory lies in the imagined front end; ring addresses are of this kind.
USER_BASE: Final = 0x5500_0000_0000
DEFAULT_SLOT_BYTES: Final = 1 << 20
# What one data descriptor may hold when the device sets no limit.
DEFAULT_SEGMENT_BYTES: Final = 1 << 30


class RequestType(IntEnum):
    """virtio 1.3 §5.2.6: what a request asks for."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


# The device features that this driver understands.
_UNDERSTOOD: Final = (
    BlkFeature.SIZE_MAX,
    BlkFeature.SEG_MAX,
    BlkFeature.RO,
    BlkFeature.BLK_SIZE,
    BlkFeature.FLUSH,
    BlkFeature.TOPOLOGY,
    BlkFeature.CONFIG_WCE,
    BlkFeature.MQ,
    BlkFeature.DISCARD,
    BlkFeature.WRITE_ZEROES,
    BlkFeature.RING_EVENT_IDX,
    BlkFeature.VERSION_1,
)
_WANTED: Final = feature_mask(*_UNDERSTOOD, VHOST_USER_F_PROTOCOL_FEATURES)
_WANTED_PROTOCOL: Final = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
_STATUS_NAMES: Final = {1: "i/o error", 2: "unsupported", 255: "status not written"}
_ID_BYTES: Final = 20
# struct virtio_blk_config without geometry and topology, to the byte may_unmap.
_CONFIG: Final = struct.Struct("<QII4xI8xBxHIIIIIB")
_SEGMENT: Final = struct.Struct("<QII")  # sector, number of sectors, flags
_UNMAP: Final = 1


def status_name(status: int) -> str:
    """Name a status byte of virtio 1.3 §5.2.6."""
    return _STATUS_NAMES.get(status, f"status {status}")


class RequestFailed(DrivebayError):
    """The target completed a request with another status than OK."""

    def __init__(self, kind: RequestType, sector: int, status: int) -> None:
        super().__init__(f"{kind.name} at sector {sector} failed: {status_name(status)}")
        self.status = status
        self.errno = errno.EOPNOTSUPP if status == 2 else errno.EIO


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """``struct virtio_blk_config``, as far as the driver uses it (virtio 1.3 §5.2.4)."""

    capacity_sectors: int
    size_max: int
    seg_max: int
    block_size: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_alignment_sectors: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    @classmethod
    def parse(cls, data: bytes) -> DiskConfig:
        """Read at least 60 bytes. Fields of features that were not offered hold anything."""
        return cls(*_CONFIG.unpack_from(data))


class VhostUserBlk:
    """One session with a vhost-user-blk target, with all queues running.

    ``slots`` requests of up to ``slot_bytes`` can be in flight on each queue.
    Raises: HostError, PeerError, UsageError when the session cannot be set up.
    """

    def __init__(
        self,
        path: str,
        *,
        queues: int = 1,
        slots: int = 8,
        slot_bytes: int = DEFAULT_SLOT_BYTES,
        timeout_s: float = 10.0,
        hugepages: bool = False,
    ) -> None:
        self.path = path
        self.queues: list[DriverQueue] = []
        self._descriptors: list[int] = []
        self._calls: list[int] = []
        self._errors: list[int] = []
        self._timeout_s = timeout_s
        self._memory: DriverMemory | None = None
        self.connection = Connection(path, timeout_s)
        try:
            self._negotiate(queues)
            self._share_memory(queues, slots, slot_bytes, hugepages)
            self._start_queues()
        except BaseException:
            self._release()
            raise

    @classmethod
    def connect(cls, path: str, *, queues: int = 1, timeout_s: float = 10.0) -> Self:
        """Open a session for single requests."""
        return cls(path, queues=queues, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, TargetGone):
            self._release()  # who does not answer is not asked to stop
        else:
            self.close()

    # --- what was agreed

    @property
    def features(self) -> list[str]:
        """Names of the negotiated device features."""
        return [feature.name for feature in _UNDERSTOOD if self.has(feature)]

    @property
    def protocol_features(self) -> list[str]:
        """Names of the negotiated vhost-user features."""
        return [str(feature.name) for feature in ProtocolFeature if feature in self._protocol]

    @property
    def queue_size(self) -> int:
        return self._layouts[0].size

    @property
    def max_queues(self) -> int:
        return self._max_queues

    @property
    def capacity_bytes(self) -> int:
        return self.disk.capacity_sectors * SECTOR_BYTES

    @property
    def block_size(self) -> int:
        return self.disk.block_size if self.has(BlkFeature.BLK_SIZE) else SECTOR_BYTES

    @property
    def max_request_bytes(self) -> int:
        """How much one request can transfer in this session."""
        return self._layouts[0].slot_bytes

    @property
    def write_cache(self) -> bool:
        """virtio 1.3 §5.2.6.2: may a completed write still be lost before the next flush?"""
        if self.has(BlkFeature.CONFIG_WCE):
            return bool(self.disk.writeback)
        return self.has(BlkFeature.FLUSH)

    def has(self, feature: BlkFeature) -> bool:
        return bool(self._features >> feature & 1)

    # --- single requests

    def read(self, offset: int, length: int) -> bytes:
        """Read whole sectors. Raises: RequestFailed, TargetGone, UsageError."""
        parts = [
            self._execute(RequestType.IN, at // SECTOR_BYTES, size)
            for at, size in self._pieces(offset, length, self.max_request_bytes)
        ]
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write whole sectors. Raises: RequestFailed, TargetGone, UsageError."""
        for at, size in self._pieces(offset, len(data), self.max_request_bytes):
            piece = data[at - offset : at - offset + size]
            self._execute(RequestType.OUT, at // SECTOR_BYTES, size, piece)

    def flush(self) -> None:
        """Make every completed write stable."""
        self._execute(RequestType.FLUSH, 0, 0)

    def discard(self, offset: int, length: int) -> None:
        """Give space back; what is read there afterwards is not defined."""
        self._range_request(RequestType.DISCARD, offset, length, self.disk.max_discard_sectors, 0)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Let the range read as zeroes; ``unmap`` allows the device to free it."""
        limit = self.disk.max_write_zeroes_sectors
        self._range_request(RequestType.WRITE_ZEROES, offset, length, limit, _UNMAP if unmap else 0)

    def get_id(self) -> str:
        """The device's name, of at most 20 bytes."""
        raw = self._execute(RequestType.GET_ID, 0, _ID_BYTES)
        return raw.split(b"\0")[0].decode("utf-8", "replace").rstrip()

    def request(self, kind: int, sector: int, length: int, data: bytes = b"") -> tuple[int, bytes]:
        """Send one request as it is; returns the status byte and the data area.

        For tests of a target: the kind need not be one that exists.
        """
        queue = self.queues[0]
        if len(data) > length:
            raise UsageError(f"{len(data)} bytes for a request of {length}", field="data")
        area = queue.data(0)
        area[: len(data)] = data
        queue.put(0, kind, sector, length)
        queue.publish()
        status = self._wait_for_completion(queue)
        return status, bytes(area[:length])

    # --- the device

    def config(self) -> DiskConfig:
        """Ask the target for the disk's configuration as it is now."""
        self.disk = DiskConfig.parse(self.connection.get_config())
        if self.block_size % SECTOR_BYTES or self.block_size == 0:
            raise PeerError(
                f"'{self.path}' says that its blocks have {self.block_size} bytes "
                f"(must be whole sectors of {SECTOR_BYTES})"
            )
        return self.disk

    def set_write_cache(self, enabled: bool) -> None:
        """virtio 1.3 §5.2.5: set ``writeback``; needs CONFIG_WCE. Raises: PeerError."""
        if not self.has(BlkFeature.CONFIG_WCE):
            raise PeerError(f"'{self.path}' does not let the driver choose its write cache")
        self.connection.set_config(WRITEBACK_OFFSET, bytes([enabled]))
        self.config()

    def broken_queue(self) -> int | None:
        """Index of a queue that the target gave up, by its error eventfd."""
        for index, fd in enumerate(self._errors):
            if _eventfd_fired(fd):
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

    # --- set-up, in the order of the protocol

    def _negotiate(self, queues: int) -> None:
        self._features, self._protocol = self.connection.negotiate(_WANTED, _WANTED_PROTOCOL)
        if not self.has(BlkFeature.VERSION_1):
            raise PeerError(f"'{self.path}' does not offer VIRTIO_F_VERSION_1")
        if ProtocolFeature.CONFIG not in self._protocol:
            raise PeerError(
                f"'{self.path}' offers no configuration space, so it is no vhost-user-blk target"
            )
        self._max_queues = 1
        if ProtocolFeature.MQ in self._protocol:
            self._max_queues = self.connection.ask_u64(Request.GET_QUEUE_NUM)
        if not 1 <= queues <= self._max_queues:
            raise UsageError(
                f"{queues} queues asked for (the target serves 1 to {self._max_queues})",
                field="queues",
            )
        self.config()

    def _share_memory(self, queues: int, slots: int, slot_bytes: int, hugepages: bool) -> None:
        segment = DEFAULT_SEGMENT_BYTES
        if self.has(BlkFeature.SIZE_MAX) and self.disk.size_max >= SECTOR_BYTES:  # 0: no limit
            segment = self.disk.size_max // SECTOR_BYTES * SECTOR_BYTES
        if self.has(BlkFeature.SEG_MAX) and self.disk.seg_max:
            slot_bytes = min(slot_bytes, segment * self.disk.seg_max)
        self._layouts = []
        start = 0
        for _ in range(queues):
            layout = QueueLayout.plan(start, slots, slot_bytes, segment)
            self._layouts.append(layout)
            start = layout.end
        self._memory = DriverMemory(start, hugepages=hugepages)
        self.connection.send(Request.SET_FEATURES, pack_u64(self._features))
        region = MemoryRegion(GUEST_BASE, self._memory.size, USER_BASE, 0)
        self.connection.send(Request.SET_MEM_TABLE, pack_mem_table((region,)), (self._memory.fd,))

    def _start_queues(self) -> None:
        assert self._memory is not None
        for index, layout in enumerate(self._layouts):
            kick, call, err = (self._eventfd() for _ in range(3))
            self._calls.append(call)
            self._errors.append(err)
            event_idx = self.has(BlkFeature.RING_EVENT_IDX)
            queue = DriverQueue(self._memory.map, layout, GUEST_BASE, event_idx, kick)
            self.queues.append(queue)
            send = self.connection.send
            send(Request.SET_VRING_NUM, VringState(index, layout.size).pack())
            send(Request.SET_VRING_BASE, VringState(index, 0).pack())
            address = VringAddr(
                index,
                0,
                USER_BASE + layout.desc,
                USER_BASE + layout.used,
                USER_BASE + layout.avail,
            )
            send(Request.SET_VRING_ADDR, address.pack())
            for request, fd in (
                (Request.SET_VRING_ERR, err),
                (Request.SET_VRING_CALL, call),
                (Request.SET_VRING_KICK, kick),
            ):
                send(request, VringFile(index, True).pack(), (fd,))
        if self._features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for index in range(len(self._layouts)):
                self.connection.send(Request.SET_VRING_ENABLE, VringState(index, 1).pack())

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._descriptors.append(fd)
        return fd

    def _release(self) -> None:
        self.connection.close()
        self.queues.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # --- how a single request runs

    def _execute(self, kind: RequestType, sector: int, length: int, data: bytes = b"") -> bytes:
        status, answer = self.request(kind, sector, length, data)
        if status:
            raise RequestFailed(kind, sector, status)
        return answer

    def _range_request(
        self, kind: RequestType, offset: int, length: int, limit: int, flags: int
    ) -> None:
        for at, size in self._pieces(offset, length, (limit or 1) * SECTOR_BYTES):
            segment = _SEGMENT.pack(at // SECTOR_BYTES, size // SECTOR_BYTES, flags)
            self._execute(kind, 0, len(segment), segment)

    def _pieces(self, offset: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
        for name, value in (("offset", offset), ("length", length)):
            if value % SECTOR_BYTES or value < 0:
                raise UsageError(f"{name} {value} is not in whole sectors of 512", field=name)
        for at in range(offset, offset + length, limit):
            yield at, min(limit, offset + length - at)

    def _wait_for_completion(self, queue: DriverQueue) -> int:
        """Sleep until the target calls, as a guest does: a lost call is found."""
        call = self._calls[0]
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(call, select.POLLIN)
        poll.register(self._errors[0], select.POLLIN)
        poll.register(self.connection, select.POLLRDHUP)
        while (done := queue.take()) is None:
            if queue.arm():
                continue
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise TargetGone(
                    f"'{self.path}' did not complete a request within {self._timeout_s:g} s"
                )
            _eventfd_fired(call)
            if self.broken_queue() is not None:
                raise PeerError("the target gave up queue 0", hint="the target's log says why")
            if self.connection.gone():
                raise TargetGone(f"the target closed '{self.path}' with a request outstanding")
        return done[1]


def _eventfd_fired(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
