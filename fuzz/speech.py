"""vhost-user messages that are often right, so that they get behind the first check.

Source: "Vhost-user Protocol" in QEMU's documentation; numbers come from the fake front end,
which is written from it too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from fuzz.choices import Choices
from tests.fakes.front_end import HEADER, Protocol, Request
from tests.fakes.memory import PAGE, GuestMemory, Layout

__all__ = ["DOOMED", "Message", "Offer", "Props", "Speech"]

BIT_30, LOG_ALL, PACKED = 1 << 30, 1 << 26, 1 << 34
INDIRECT_AND_EVENT = 3 << 28
GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_LOG_BASE, SET_LOG_FD = 31, 32, 6, 7
INFLIGHT_SHMFD = 12
WITHOUT = (0, Protocol.REPLY_ACK, 0, Protocol.CONFIGURE_MEM_SLOTS, Protocol.LOG_SHMFD)
RING_SIZE = 16
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000  # in each region
RING_STRIDE = 0x4000
SHARED_BYTES = 1 << 19  # an inflight region, and behind it a dirty log
INFLIGHT_AT, LOG_AT, LOG_BYTES = 0x1000, 0x10000, 0x44000  # the log reaches up to 8.5 GiB
DOOMED = 2 << 32  # the guest address of a region whose file may be truncated
QUEUES = 3
RING_MAKERS = 11  # those about rings and memory, which end a session least often
U64 = struct.Struct("=Q")
PAIR = struct.Struct("=II")
EDGES = (0, 1, 2, 3, 7, 8, 255, 256, 1023, 1024, 1025, 0xFFFF, 0x10000, 1 << 31, 0xFFFF_FFFF)
EDGES_64 = (*EDGES, 1 << 32, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)
LAYOUTS = (Layout(0, 1 << 20), Layout(1 << 32, 1 << 20, mmap_offset=PAGE))


class Message(NamedTuple):
    data: bytes
    fds: list[int]


class Offer(NamedTuple):
    """What the other side offers: virtio features, and those of the protocol."""

    features: int
    protocol: int


class Props:
    """What a front end has at hand: memory, eventfds and files of the wrong kinds."""

    def __init__(self) -> None:
        self.memory = GuestMemory(LAYOUTS)
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        self.pipe = os.pipe()
        self.channel = socket.socketpair()
        self.shared = os.memfd_create("shared", os.MFD_CLOEXEC)
        os.ftruncate(self.shared, SHARED_BYTES)
        self.doomed = -1
        regions = [region.fd for region in self.memory.regions]
        ends = [end.fileno() for end in self.channel]
        self.any_fds = [*self.eventfds, *regions, self.shared, *self.pipe, *ends]

    def begin(self) -> None:
        """As new for the next session."""
        for fd in self.eventfds:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
        for region in self.memory.regions:
            region.bytes[: 2 * RING_STRIDE] = bytes(2 * RING_STRIDE)
        os.ftruncate(self.shared, 0)
        os.ftruncate(self.shared, SHARED_BYTES)
        self.doomed = os.memfd_create("doomed", os.MFD_CLOEXEC)
        os.ftruncate(self.doomed, 1 << 16)

    def end(self) -> None:
        os.close(self.doomed)

    def close(self) -> None:
        self.memory.close()
        for fd in (*self.eventfds, *self.pipe, self.shared):
            os.close(fd)
        for end in self.channel:
            end.close()


class Speech:
    """Messages out of decisions."""

    def __init__(self, choices: Choices, props: Props, offer: Offer) -> None:
        self.choices = choices
        self.props = props
        self.offer = offer
        self.without = choices.pick((PACKED, PACKED | INDIRECT_AND_EVENT, 0))
        self._makers: tuple[tuple[int, Callable[[], tuple[bytes, list[int]]]], ...] = (
            *((request, self._vring_state) for request in (8, 10, 11, 18)),
            (Request.SET_VRING_ADDR, self._addresses),
            *((request, self._notifier) for request in (12, 13, 14)),
            (Request.SET_MEM_TABLE, self._table),
            (Request.ADD_MEM_REG, self._region_message),
            (Request.REM_MEM_REG, self._region_message),
            (Request.SET_FEATURES, self._features),
            (Request.SET_PROTOCOL_FEATURES, self._protocol),
            (Request.SET_STATUS, self._status),
            (Request.GET_CONFIG, self._config),
            (Request.SET_CONFIG, self._config),
            (Request.SET_BACKEND_REQ_FD, lambda: (b"", [props.channel[1].fileno()])),
            (Request.RESET_DEVICE, self._nothing),
            (GET_INFLIGHT_FD, self._inflight),
            (SET_INFLIGHT_FD, self._inflight),
            (SET_LOG_BASE, self._log),
            (SET_LOG_FD, lambda: (b"", [props.eventfds[3]])),
        )

    # Whole messages ---------------------------------------------------------------------

    def opening(self) -> list[Message]:
        """What a well-behaved front end begins with; perhaps all of it, perhaps less."""
        protocol = self.offer.protocol & ~(1 << self.choices.pick(WITHOUT))
        features = self._usual_features()
        memory = [self._region(0), self._region(1)]
        fds = [region.fd for region in self.props.memory.regions]
        if self.choices.pick((False, True)):
            memory.append(self._doomed_region())
            fds.append(self.props.doomed)
        table = PAIR.pack(len(memory), 0) + b"".join(memory)
        whole = [
            Message(message(16, U64.pack(protocol)), []),
            Message(message(2, U64.pack(features)), []),
            Message(message(Request.SET_MEM_TABLE, table), fds),
            Message(message(8, PAIR.pack(0, RING_SIZE)), []),
            Message(message(9, self._good_addresses(0, 0)), []),
            Message(message(12, U64.pack(0)), [self.props.eventfds[0]]),
            Message(message(13, U64.pack(0)), [self.props.eventfds[1]]),
            Message(message(18, PAIR.pack(0, 1)), []),
        ]
        whole = whole[: len(whole) - self.choices.pick((0, 0, 0, 0, 1, 3, 6, 8))]
        if self.choices.rarely(2):  # before the rings start
            whole[3:3] = self._side_memory()
        return whole

    def _side_memory(self) -> list[Message]:
        """An inflight region and a dirty log, as far as they are offered."""
        shared = [self.props.shared]
        said = []
        if self.offer.protocol >> INFLIGHT_SHMFD & 1:
            region = struct.pack("=QQHHI", 0x4000, INFLIGHT_AT, QUEUES, RING_SIZE, 0)
            said.append(Message(message(SET_INFLIGHT_FD, region), shared))
        if self.offer.protocol >> Protocol.LOG_SHMFD & 1:
            log = struct.pack("=QQ", LOG_BYTES, LOG_AT)
            said.append(Message(message(SET_LOG_BASE, log), shared))
        return said

    def next(self) -> Message:
        choices = self.choices
        if choices.rarely(24):
            request: int = choices.pick((*Request, 0, 19, 28, 99, 0xFFFF_FFFF))
            payload, fds = choices.raw(choices.pick((0, 8, 12, 40))), list[int]()
        else:
            usual = self._makers[: choices.pick((RING_MAKERS, len(self._makers)))]
            request, make = choices.pick(usual)
            payload, fds = make()
        if choices.rarely(48):
            payload = payload[: choices.below(len(payload) + 1)]
        if choices.rarely(48):
            payload += bytes(choices.pick((1, 8, 300)))
        if choices.rarely(32):
            fds = [choices.pick(self.props.any_fds) for _ in range(choices.below(11))]
        flags = choices.pick((1, 1 | 8))
        if choices.rarely(64):
            flags = choices.pick((1 | 4, 0, 2, choices.number(4)))
        size = choices.pick((*EDGES, 1 << 30)) if choices.rarely(40) else len(payload)
        return Message(HEADER.pack(request, flags, size) + payload, fds)

    # Payloads ---------------------------------------------------------------------------

    def _edge(self, usual: int) -> int:
        return self.choices.pick(EDGES_64) if self.choices.rarely(24) else usual

    def _edge_32(self, usual: int) -> int:
        return self._edge(usual) & 0xFFFF_FFFF

    def _queue(self) -> int:
        return self._edge_32(self.choices.below(QUEUES))

    def _nothing(self) -> tuple[bytes, list[int]]:
        return b"", []

    def _vring_state(self) -> tuple[bytes, list[int]]:
        value = self.choices.pick((1, 0, RING_SIZE, 8, 1024, 1 << 15, 0x8000_8000, 0xFFFF))
        return PAIR.pack(self._queue(), self._edge_32(value)), []

    def _good_addresses(self, queue: int, region: int) -> bytes:
        base = self.props.memory.regions[region].user_addr + RING_STRIDE * (queue % 8)
        where = [base + DESC, base + USED, base + AVAIL]
        return struct.pack("=IIQQQQ", queue & 0xFFFF_FFFF, 0, *where, 0)

    def _addresses(self) -> tuple[bytes, list[int]]:
        payload = bytearray(self._good_addresses(self._queue(), self.choices.below(2)))
        if self.choices.rarely(12):
            at = 8 + 8 * self.choices.below(4)
            payload[at : at + 8] = U64.pack(self.choices.pick(EDGES_64))
        payload[4] = self.choices.pick((0, 0, 1, 0xFF))  # the flag that asks for logging
        return bytes(payload), []

    def _notifier(self) -> tuple[bytes, list[int]]:
        if self.choices.rarely(5):
            return U64.pack(self.choices.below(QUEUES) | 1 << 8), []
        return U64.pack(self._queue()), [self.props.eventfds[self.choices.below(3)]]

    def _region(self, which: int) -> bytes:
        region = self.props.memory.regions[which]
        fields = [region.guest_addr, region.size, region.user_addr, region.mmap_offset]
        if self.choices.rarely(20):
            fields[self.choices.below(4)] = self.choices.pick(EDGES_64)
        return struct.pack("=4Q", *fields)

    def _doomed_region(self) -> bytes:
        return struct.pack("=4Q", DOOMED, 1 << 16, 0x6000_0000_0000, 0)

    def _table(self) -> tuple[bytes, list[int]]:
        count = self.choices.pick((2, 1, 0, 2, 3, 8))
        regions = [self._region(i % 2) for i in range(count)]
        fds = [self.props.memory.regions[i % 2].fd for i in range(count)]
        if count and self.choices.rarely(3):
            regions[-1], fds[-1] = self._doomed_region(), self.props.doomed
        return PAIR.pack(self._edge_32(count), 0) + b"".join(regions), fds

    def _region_message(self) -> tuple[bytes, list[int]]:
        which = self.choices.below(3)
        if which == 2:
            return bytes(8) + self._doomed_region(), [self.props.doomed]
        return bytes(8) + self._region(which), [self.props.memory.regions[which].fd]

    def _usual_features(self) -> int:
        """Those of the opening; a migration switches the log on and off while rings run."""
        log = self.choices.pick((LOG_ALL, 0))
        return self.offer.features & ~self.without & ~log | BIT_30

    def _features(self) -> tuple[bytes, list[int]]:
        usual = self._usual_features()
        return U64.pack(self.choices.pick((usual, usual, usual & ~BIT_30, self._edge(0)))), []

    def _protocol(self) -> tuple[bytes, list[int]]:
        without = 1 << self.choices.pick(WITHOUT)
        return U64.pack(self._edge(self.offer.protocol & ~without)), []

    def _status(self) -> tuple[bytes, list[int]]:
        return U64.pack(self._edge(self.choices.pick((15, 0, 11, 0x80)))), []

    def _config(self) -> tuple[bytes, list[int]]:
        offset, size = self.choices.pick(((32, 1), (0, 60), (0, 256), (250, 6)))
        data = self.choices.raw(size)
        return struct.pack("=III", self._edge_32(offset), self._edge_32(size), 0) + data, []

    def _inflight(self) -> tuple[bytes, list[int]]:
        """``u64 mmap_size; u64 mmap_offset; u16 num_queues; u16 queue_size``"""
        size = self._edge(self.choices.pick((0x4000, 0x1000, 1 << 16)))
        offset = self._edge(self.choices.pick((INFLIGHT_AT, 0, 64)))
        queues = self._edge(self.choices.pick((1, 2, QUEUES))) & 0xFFFF
        entries = self._edge(self.choices.pick((RING_SIZE, 8, 1024))) & 0xFFFF
        return struct.pack("=QQHHI", size, offset, queues, entries, 0), [self.props.shared]

    def _log(self) -> tuple[bytes, list[int]]:
        """``u64 mmap_size; u64 mmap_offset``"""
        size = self._edge(self.choices.pick((LOG_BYTES, 0x1000, LOG_BYTES, 1)))
        return struct.pack("=QQ", size, self._edge(LOG_AT)), [self.props.shared]


def message(request: int, payload: bytes) -> bytes:
    return HEADER.pack(request, 1, len(payload)) + payload
