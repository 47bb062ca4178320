"""vhost-user on the wire: message numbers, flags, feature bits and payload layouts.

Vocabulary only. It knows nothing of sockets or sessions, and both sides of a
socket may use it. Every ``parse`` gets bytes that somebody else wrote: it
checks what can be checked without knowing the session and raises PeerError.
Source: "Vhost-user Protocol" in QEMU's documentation. All fields are in the
byte order of the machine, which is little-endian here (wire/layout.h).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from drivebay.errors import PeerError

__all__ = [
    "FRONT_END_CONFIG",
    "HEADER_BYTES",
    "INFLIGHT_BYTES",
    "MAX_CONFIG_BYTES",
    "MAX_FDS",
    "MAX_QUEUES",
    "MAX_TABLE_REGIONS",
    "MEM_REGION_BYTES",
    "MEM_TABLE_HEADER_BYTES",
    "MIGRATION_CONFIG",
    "NO_FD",
    "VHOST_F_LOG_ALL",
    "VHOST_USER_F_PROTOCOL_FEATURES",
    "VHOST_VRING_F_LOG",
    "BackendRequest",
    "ConfigAccess",
    "Header",
    "HeaderFlag",
    "Inflight",
    "LogArea",
    "MemoryRegion",
    "ProtocolFeature",
    "Request",
    "VringAddr",
    "VringFile",
    "VringState",
    "feature_names",
    "pack_mem_table",
    "pack_message",
    "pack_single_region",
    "pack_u64",
    "parse_mem_table",
    "parse_single_region",
    "parse_u64",
]

VERSION: Final = 1
HEADER_BYTES: Final = 12
MAX_FDS: Final = 8
MAX_TABLE_REGIONS: Final = 8
MAX_CONFIG_BYTES: Final = 256
MAX_QUEUES: Final = 256  # a queue's index has eight bits in the SET_VRING_KICK payload
NO_FD: Final = 1 << 8
MEM_TABLE_HEADER_BYTES: Final = 8
MEM_REGION_BYTES: Final = 32
INFLIGHT_BYTES: Final = (20, 24)  # without and with padding

# Bits of the virtio feature word that belong to vhost, not to the device.
VHOST_F_LOG_ALL: Final = 26
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30

# A bit of the flags of a vring address.
VHOST_VRING_F_LOG: Final = 0

# The flags word of a config access: who writes, and why.
FRONT_END_CONFIG: Final = 0
MIGRATION_CONFIG: Final = 1

_HEADER: Final = struct.Struct("=III")
_U64: Final = struct.Struct("=Q")
_VRING_STATE: Final = struct.Struct("=II")
_VRING_ADDR: Final = struct.Struct("=IIQQQQ")
_REGION_COUNT: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")
_LOG: Final = struct.Struct("=QQ")
_CONFIG: Final = struct.Struct("=III")
_INFLIGHT: Final = struct.Struct("=QQHH")


class Request(IntEnum):
    """What a front end may send; the state table says which of these are served."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """What a back end may send on the channel that SET_BACKEND_REQ_FD brought."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_*, as a mask."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20


class HeaderFlag(IntFlag):
    """Bits of the header's flags word above the two of the version."""

    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


def feature_names(mask: int) -> str:
    """Name the bits of a feature word by number, for error texts.

    >>> feature_names(1 << 5 | 1 << 34)
    'bits 5, 34'
    """
    bits = [str(bit) for bit in range(64) if mask >> bit & 1]
    return f"bit{'s' if len(bits) != 1 else ''} {', '.join(bits)}"


def _unpack(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise PeerError(f"{what} is {len(payload)} bytes long (must be {layout.size})")
    return layout.unpack(payload)


@dataclass(frozen=True, slots=True)
class Header:
    """``struct { u32 request; u32 flags; u32 size; }``

    >>> Header.parse(pack_message(Request.GET_FEATURES, b""))
    Header(request=1, need_reply=False, size=0)
    """

    request: int
    need_reply: bool
    size: int

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Check what a front end sent: version 1, and not a reply. Raises: PeerError."""
        request, flags, size = _unpack(_HEADER, data, "a message header")
        if flags & 3 != VERSION:
            raise PeerError(f"message {request} has version {flags & 3} (must be {VERSION})")
        if flags & HeaderFlag.REPLY:
            raise PeerError(f"message {request} is marked as a reply, but nothing was asked")
        return cls(request, bool(flags & HeaderFlag.NEED_REPLY), size)


def pack_message(request: int, payload: bytes, flags: int = 0) -> bytes:
    """Put the header before a payload; ``flags`` are those of HeaderFlag."""
    return _HEADER.pack(request, VERSION | flags, len(payload)) + payload


def pack_u64(value: int) -> bytes:
    return _U64.pack(value)


def parse_u64(payload: bytes) -> int:
    return _unpack(_U64, payload, "a u64 payload")[0]


def _checked_index(index: int) -> int:
    if index >= MAX_QUEUES:
        raise PeerError(f"queue {index} does not exist (0 to {MAX_QUEUES - 1} do)")
    return index


@dataclass(frozen=True, slots=True)
class VringState:
    """``struct vhost_vring_state { u32 index; u32 num; }``"""

    index: int
    num: int

    @classmethod
    def parse(cls, payload: bytes) -> VringState:
        index, num = _unpack(_VRING_STATE, payload, "a vring state")
        return cls(_checked_index(index), num)

    def pack(self) -> bytes:
        return _VRING_STATE.pack(self.index, self.num)


@dataclass(frozen=True, slots=True)
class VringAddr:
    """``struct vhost_vring_addr { u32 index, flags; u64 desc, used, avail, log; }``

    "A vring address description": the three are user addresses of the front end, ``log``
    is the used ring's guest address.
    """

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0

    @classmethod
    def parse(cls, payload: bytes) -> VringAddr:
        index, *rest = _unpack(_VRING_ADDR, payload, "a vring address")
        return cls(_checked_index(index), *rest)

    @property
    def is_logged(self) -> bool:
        return bool(self.flags >> VHOST_VRING_F_LOG & 1)

    def pack(self) -> bytes:
        return _VRING_ADDR.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)


@dataclass(frozen=True, slots=True)
class VringFile:
    """The u64 of SET_VRING_KICK, CALL and ERR: bits 0-7 index, bit 8 "no descriptor"."""

    index: int
    has_fd: bool

    @classmethod
    def parse(cls, payload: bytes) -> VringFile:
        value = parse_u64(payload)
        if value >> 9:
            raise PeerError(f"the queue word {value:#x} has bits above 8, which must be 0")
        return cls(value & 0xFF, not value & NO_FD)

    def pack(self) -> bytes:
        return pack_u64(self.index | (0 if self.has_fd else NO_FD))


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """``struct { u64 guest_addr, size, user_addr, mmap_offset; }``

    Whether regions overlap, wrap or end behind their file is for whoever maps
    them to say (memory.guest_memory).
    """

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int

    def pack(self) -> bytes:
        return _REGION.pack(self.guest_addr, self.size, self.user_addr, self.mmap_offset)

    def same_place(self, other: MemoryRegion) -> bool:
        """REM_MEM_REG: regions match by guest address, user address and size."""
        return (self.guest_addr, self.user_addr, self.size) == (
            other.guest_addr,
            other.user_addr,
            other.size,
        )


def parse_mem_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    """ "Memory regions description": a count, padding, and so many regions."""
    if len(payload) < MEM_TABLE_HEADER_BYTES:
        raise PeerError(f"a memory table of {len(payload)} bytes has no room for its count")
    count, _padding = _REGION_COUNT.unpack_from(payload)
    if count > MAX_TABLE_REGIONS:
        raise PeerError(f"{count} regions in one memory table (at most {MAX_TABLE_REGIONS} fit)")
    length = MEM_TABLE_HEADER_BYTES + count * MEM_REGION_BYTES
    if len(payload) != length:
        raise PeerError(
            f"a memory table of {count} regions is {len(payload)} bytes long (must be {length})"
        )
    return tuple(
        MemoryRegion(*_REGION.unpack_from(payload, MEM_TABLE_HEADER_BYTES + i * MEM_REGION_BYTES))
        for i in range(count)
    )


def pack_mem_table(regions: tuple[MemoryRegion, ...]) -> bytes:
    return _REGION_COUNT.pack(len(regions), 0) + b"".join(region.pack() for region in regions)


def parse_single_region(payload: bytes) -> MemoryRegion:
    """ "Single memory region description": padding and one region."""
    if len(payload) != 8 + MEM_REGION_BYTES:
        raise PeerError(
            f"a single memory region is {len(payload)} bytes long (must be {8 + MEM_REGION_BYTES})"
        )
    return MemoryRegion(*_REGION.unpack_from(payload, 8))


def pack_single_region(region: MemoryRegion) -> bytes:
    return bytes(8) + region.pack()


@dataclass(frozen=True, slots=True)
class LogArea:
    """ "Log description": ``struct { u64 mmap_size, mmap_offset; }``

    Whether they end behind their file, or wrap, is for whoever maps them to say
    (dataplane.dirty_log).
    """

    size: int
    mmap_offset: int

    @classmethod
    def parse(cls, payload: bytes) -> LogArea:
        return cls(*_unpack(_LOG, payload, "a log description"))

    def pack(self) -> bytes:
        return _LOG.pack(self.size, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """``struct { u32 offset, size, flags; u8 payload[size]; }``

    ``data`` may be shorter than ``size`` in GET_CONFIG, where nobody needs it.
    """

    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, payload: bytes) -> ConfigAccess:
        if len(payload) < _CONFIG.size:
            raise PeerError(
                f"a config access of {len(payload)} bytes is too short (must be {_CONFIG.size})"
            )
        offset, size, flags = _CONFIG.unpack_from(payload)
        return cls(offset, size, flags, payload[_CONFIG.size :])

    def pack(self) -> bytes:
        return _CONFIG.pack(self.offset, self.size, self.flags) + self.data


@dataclass(frozen=True, slots=True)
class Inflight:
    """``struct { u64 mmap_size, mmap_offset; u16 num_queues, queue_size; }``

    "Inflight description". Most front ends send the four bytes of padding that C puts behind
    it, some do not; the answer to GET_INFLIGHT_FD is as long as its question.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def parse(cls, payload: bytes) -> Inflight:
        if len(payload) not in INFLIGHT_BYTES:
            raise PeerError(
                f"an inflight description is {len(payload)} bytes long (must be "
                f"{INFLIGHT_BYTES[0]} or {INFLIGHT_BYTES[1]})"
            )
        return cls(*_INFLIGHT.unpack_from(payload))

    def pack(self, length: int) -> bytes:
        fields = (self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return _INFLIGHT.pack(*fields).ljust(length, b"\0")
