"""A vhost-user-blk initiator: the driver's side of any such target, without a guest.

Context: control; every call blocks. `VhostUserBlk` negotiates and offers single requests
(tests, tools); memory and rings are `vhost_user_session`'s, and load over the same queues
is `vhost_user_workload`. Nothing that the target sends is trusted.
"""

from __future__ import annotations

import errno
import select
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from drivebay.engines.vhost_user_connection import CannotConnect, Connection, TargetGone
from drivebay.engines.vhost_user_memory import QueueLayout
from drivebay.engines.vhost_user_queue import DriverQueue
from drivebay.engines.vhost_user_session import DriverSession, eventfd_fired
from drivebay.errors import DrivebayError, PeerError, UsageError
from drivebay.wire.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    ProtocolFeature,
    Request,
)
from drivebay.wire.virtio_blk import (
    SECTOR_BYTES,
    WRITEBACK_OFFSET,
    BlkFeature,
    feature_mask,
)

__all__ = ["DiskConfig", "RequestFailed", "RequestType", "VhostUserBlk"]

DEFAULT_SLOT_BYTES: Final = 1 << 20
# What one data descriptor may hold when the device sets no limit.
DEFAULT_SEGMENT_BYTES: Final = 1 << 30
RETRY_S: Final = 0.05


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
    BlkFeature.RING_INDIRECT_DESC,
    BlkFeature.RING_EVENT_IDX,
    BlkFeature.VERSION_1,
    BlkFeature.RING_PACKED,
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


class VhostUserBlk(DriverSession):
    """One session with a vhost-user-blk target, with all queues running.

    ``slots`` requests of up to ``slot_bytes`` can be in flight on each queue. Rings are
    packed where the target offers it; then an entry points to its request's descriptors, or
    without ``indirect`` holds them. With ``keep_inflight`` the session can outlive the target
    (``reconnect``).
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
        indirect: bool = True,
        keep_inflight: bool = False,
    ) -> None:
        super().__init__(path, timeout_s)
        self._indirect = indirect
        self._keep_inflight = keep_inflight
        try:
            self._negotiate(queues)
            self._create(self._plan(queues, slots, slot_bytes), hugepages)
            self._hand_over()
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

    def reconnect(self, within_s: float, gives_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for a target that went away, and let it go on where it was.

        Requests in flight stay so, and complete when it is back; another thread may
        submit more meanwhile, or poll. Needs ``keep_inflight``.
        Raises: TargetGone when it is not back in time, or away when ``gives_up`` says so;
        PeerError when it came back as another.
        """
        deadline = time.monotonic() + within_s
        while True:
            try:
                return self._resume()
            except (CannotConnect, TargetGone) as error:
                if time.monotonic() > deadline or gives_up():
                    raise TargetGone(
                        f"'{self.path}' did not come back within {within_s:g} s: {error}",
                        hint=error.hint,
                    ) from error
            time.sleep(RETRY_S)

    # --- set-up, in the order of the protocol

    def _negotiate(self, queues: int) -> None:
        features, protocol = _WANTED, _WANTED_PROTOCOL
        if self._keep_inflight:
            protocol |= ProtocolFeature.INFLIGHT_SHMFD
        self._features, self._protocol = self.connection.negotiate(features, protocol)
        if not (self.packed and self._indirect):
            self._features &= ~feature_mask(BlkFeature.RING_INDIRECT_DESC)
        if not self.has(BlkFeature.VERSION_1):
            raise PeerError(f"'{self.path}' does not offer VIRTIO_F_VERSION_1")
        if ProtocolFeature.CONFIG not in self._protocol:
            raise PeerError(
                f"'{self.path}' offers no configuration space, so it is no vhost-user-blk target"
            )
        if self._keep_inflight and ProtocolFeature.INFLIGHT_SHMFD not in self._protocol:
            raise PeerError(
                f"'{self.path}' offers no INFLIGHT_SHMFD: it cannot go on after a crash",
                hint="run without --reconnect",
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

    def _plan(self, queues: int, slots: int, slot_bytes: int) -> list[QueueLayout]:
        segment = DEFAULT_SEGMENT_BYTES
        if self.has(BlkFeature.SIZE_MAX) and self.disk.size_max >= SECTOR_BYTES:  # 0: no limit
            segment = self.disk.size_max // SECTOR_BYTES * SECTOR_BYTES
        if self.has(BlkFeature.SEG_MAX) and self.disk.seg_max:
            slot_bytes = min(slot_bytes, segment * self.disk.seg_max)
        layouts: list[QueueLayout] = []
        for _ in range(queues):
            layout = QueueLayout.plan(
                layouts[-1].end if layouts else 0,
                slots,
                slot_bytes,
                segment,
                packed=self.packed,
                indirect=self.has(BlkFeature.RING_INDIRECT_DESC),
            )
            layouts.append(layout)
        return layouts

    def _resume(self) -> None:
        """One try: a new connection, the same agreement, and what is in flight."""
        agreed, disk = (self._features, self._protocol), self.disk
        self.connection.close()
        self.connection = Connection(self.path, self._timeout_s)
        try:
            self._negotiate(len(self.queues))
            if (self._features, self._protocol) != agreed:
                raise PeerError(f"'{self.path}' came back with other features than it had")
            if self.disk.capacity_sectors < disk.capacity_sectors:
                raise PeerError(
                    f"'{self.path}' came back with {self.disk.capacity_sectors} sectors "
                    f"of the {disk.capacity_sectors} it had"
                )
            self._hand_over()
            if self.config().writeback != disk.writeback:
                self.set_write_cache(bool(disk.writeback))
        except BaseException:
            self.connection.close()
            (self._features, self._protocol), self.disk = agreed, disk
            raise

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
            eventfd_fired(call)
            if self.broken_queue() is not None:
                raise PeerError("the target gave up queue 0", hint="the target's log says why")
            if self.connection.gone():
                raise TargetGone(f"the target closed '{self.path}' with a request outstanding")
        return done[1]
