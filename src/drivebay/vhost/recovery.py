"""Inflight regions: what a front end keeps for us, so that the next target can go on.

Context: control. GET_INFLIGHT_FD makes a region, SET_INFLIGHT_FD brings one back, most
often our own, sometimes that of a target which was killed. The front end can write into
it at any time: nothing in it is believed that would not be believed from a message.

Behind the queues the region has a tail that is ours: which disk the requests in it belong
to, and the session's cache mode, which no message tells a new target. A region without a
tail is another target's, and welcome.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from drivebay.dataplane.inflight import (
    INFLIGHT_TAIL_BYTES,
    InflightQueue,
    InflightRegion,
    inflight_queue_bytes,
)
from drivebay.errors import HostError, PeerError
from drivebay.vhost.ring import MAX_RING_SIZE
from drivebay.wire.vhost_user import MAX_QUEUES, Inflight
from drivebay.wire.virtio_blk import BlkFeature

__all__ = ["Content", "Recovery", "Tail", "make_region"]

# magic, layout version, writeback, whether the disk is volatile, the disk's identity
_TAIL: Final = struct.Struct("<8sHBB4x32s16x")
_MAGIC: Final = b"drivebay"
_VERSION: Final = 1
_WRITEBACK_AT: Final = 10


class Content(Protocol):
    """A bdev, as far as a region must know it."""

    @property
    def name(self) -> str: ...
    @property
    def content_id(self) -> str:
        """Differs when its content is not the one that a guest has seen before."""

    @property
    def volatile_content(self) -> bool:
        """Whether the content ends with the process."""


class Disk(Protocol):
    """Where a session gets its bdev; the controller is one."""

    @property
    def bdev(self) -> Content | None:
        """None after it was removed."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What the region tells the next target."""

    identity: bytes
    volatile: bool
    writeback: bool

    @classmethod
    def of(cls, bdev: Content, writeback: bool) -> Tail:
        identity = hashlib.sha256(bdev.content_id.encode()).digest()
        return cls(identity, bdev.volatile_content, writeback)

    @classmethod
    def parse(cls, data: bytes) -> Tail | None:
        """None when nobody has written one. Raises: PeerError."""
        if not any(data):
            return None
        magic, version, writeback, volatile, identity = _TAIL.unpack(data)
        if magic != _MAGIC or version != _VERSION or writeback > 1 or volatile > 1:
            raise PeerError(
                f"the inflight region ends with something that no target has written there: "
                f"{data[:12].hex(' ')}"
            )
        return cls(identity, bool(volatile), bool(writeback))

    def pack(self) -> bytes:
        return _TAIL.pack(_MAGIC, _VERSION, self.writeback, self.volatile, self.identity)


def _check_size(asked: Inflight) -> None:
    """The front end's numbers decide how much memory is taken. Raises: PeerError."""
    if not 1 <= asked.num_queues <= MAX_QUEUES or not 1 <= asked.queue_size <= MAX_RING_SIZE:
        raise PeerError(
            f"an inflight region for {asked.num_queues} queues of {asked.queue_size} entries "
            f"(1 to {MAX_QUEUES} queues and 1 to {MAX_RING_SIZE} entries are served)"
        )


def make_region(asked: Inflight, *, packed: bool, tail: Tail) -> tuple[Inflight, int]:
    """GET_INFLIGHT_FD: a new region, and its descriptor, which is the caller's to close.

    Raises: PeerError, HostError.
    """
    _check_size(asked)
    queues = asked.num_queues * inflight_queue_bytes(asked.queue_size, packed)
    size = queues + INFLIGHT_TAIL_BYTES
    try:
        fd = os.memfd_create("drivebay-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostError("cannot make an inflight region", error.errno or errno.EIO) from error
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, tail.pack(), queues)
        # A front end that shrinks it would end its own session; so it cannot by mistake.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise HostError("cannot make an inflight region", error.errno or errno.EIO) from error
    return Inflight(size, 0, asked.num_queues, asked.queue_size), fd


def _check_disk(tail: Tail, bdev: Content) -> None:
    """Requests that one disk has not answered are not another's to do. Raises: PeerError."""
    if tail.identity == Tail.of(bdev, tail.writeback).identity:
        return
    if tail.volatile and bdev.volatile_content:
        raise PeerError(
            f"it is not resumed: bdev '{bdev.name}' is a RAM disk that is new and empty, and what "
            "the guest had stored ended with the target before",
            hint="restart the guest",
        )
    raise PeerError(
        f"it is not resumed: its requests in flight belong to another disk than bdev '{bdev.name}'",
        hint="give the controller the former disk, or restart the guest",
    )


class Recovery:
    """The inflight region of one session, as far as it has one."""

    def __init__(self, disk: Disk, on_broken: Callable[[], None]) -> None:
        self._disk = disk
        self._on_broken = on_broken
        self._region: InflightRegion | None = None

    def offer(self, asked: Inflight, *, packed: bool, writeback: bool) -> tuple[Inflight, int]:
        """GET_INFLIGHT_FD: as make_region. It is in use when SET_INFLIGHT_FD brings it back."""
        bdev = self._disk.bdev
        if bdev is None:
            raise PeerError("there is no disk any more whose requests could be kept")
        return make_region(asked, packed=packed, tail=Tail.of(bdev, writeback))

    async def take(self, told: Inflight, fd: int, *, packed: bool, writeback: bool) -> bool:
        """SET_INFLIGHT_FD, while no ring is started. Returns: the cache mode that it tells.

        Raises: PeerError for numbers that do not fit and for a region of another disk; HostError.
        """
        _check_size(told)
        region = await asyncio.to_thread(
            InflightRegion,
            fd=fd,
            mmap_size=told.mmap_size,
            mmap_offset=told.mmap_offset,
            num_queues=told.num_queues,
            queue_size=told.queue_size,
            packed=packed,
            on_broken=self._on_broken,
        )
        await self.drop()
        self._region = region
        tail = Tail.parse(region.read_tail()) if region.has_tail else None
        if tail is None:
            return writeback
        if self._disk.bdev is not None:
            _check_disk(tail, self._disk.bdev)
        return tail.writeback

    def store_writeback(self, writeback: bool) -> None:
        """Keep the cache mode for the next target."""
        if self._region is not None and self._region.has_tail:
            self._region.write_tail(bytes([writeback]), _WRITEBACK_AT)

    def queue(self, index: int, features: int) -> InflightQueue | None:
        """What a queue that starts now keeps its requests in. Raises: PeerError."""
        if self._region is None:
            return None
        packed = bool(features >> BlkFeature.RING_PACKED & 1)
        if self._region.packed != packed:
            kinds = ("split", "packed")
            raise PeerError(
                f"queue {index} starts with a {kinds[packed]} ring, but the inflight region was "
                f"set for {kinds[self._region.packed]} ones (SET_FEATURES must come before it)"
            )
        return self._region.queue(index)

    async def drop(self) -> None:
        """Unmap it; no ring is started."""
        region, self._region = self._region, None
        if region is not None:
            await asyncio.to_thread(region.release)
