"""A vhost-user front end: what a VM monitor says, and what it must never say.

Written from the vhost-user document. Blocking sockets with one generous time-out; each message
is a method; ``send_raw`` sends anything at all. Never imports drivebay.
Context: tests.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Self

from tests.fakes.memory import GuestMemory, GuestRegion

HEADER = struct.Struct("=III")
VERSION = 1
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
NO_FD = 1 << 8
REPLY_FDS_MAX = 32


class Request(IntEnum):
    """Front-end message types (vhost-user, "Front-end message types")."""

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
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Protocol(IntEnum):
    """Protocol feature bits (vhost-user, "Protocol features")."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16


BACKEND_CONFIG_CHANGE = 2
F_LOG_ALL = 26
F_PROTOCOL_FEATURES = 30


class Message(NamedTuple):
    """One message as it came: header, payload, descriptors (now the receiver's)."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]


class Inflight(NamedTuple):
    """What an inflight region is: its descriptor (the receiver's), and its description."""

    fd: int
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class HungUp(Exception):
    """The other side closed the connection."""


class Refused(Exception):
    """The other side answered need_reply with a non-zero value."""


def region_bytes(region: GuestRegion) -> bytes:
    """One memory region description: guest address, size, user address, mmap offset."""
    return struct.pack(
        "=QQQQ", region.guest_addr, region.size, region.user_addr, region.mmap_offset
    )


def read_message(sock: socket.socket) -> Message:
    """One whole message from a socket, of either direction. Raises HungUp at its end."""
    fds: list[int] = []
    head = _read_exactly(sock, HEADER.size, fds)
    request, flags, size = HEADER.unpack(head)
    payload = _read_exactly(sock, size, fds)
    return Message(request, flags, payload, tuple(fds))


def _read_exactly(sock: socket.socket, size: int, fds: list[int]) -> bytes:
    data = b""
    room = socket.CMSG_SPACE(REPLY_FDS_MAX * array.array("i").itemsize)
    while len(data) < size:
        try:
            piece, ancillary, _, _ = sock.recvmsg(size - len(data), room)
        except ConnectionResetError:
            piece, ancillary = b"", []
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += array.array("i", raw[: len(raw) - len(raw) % 4])
        if not piece:
            raise HungUp(f"after {len(data)} of {size} bytes")
        data += piece
    return data


class FrontEnd:
    """One connection to a vhost-user back end."""

    def __init__(self, path: str | os.PathLike[str], timeout: float = 20.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A full backlog makes connect() wait, and this bounds the wait.
        limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.socket.connect(os.fspath(path))
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(timeout)
        self.features = 0
        self.protocol_features = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    # ---- bytes -------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send anything. Raises HungUp when the other side is gone."""
        try:
            sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HungUp(str(error)) from error

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send one message; ``size`` and ``flags`` may lie."""
        length = len(payload) if size is None else size
        self.send_raw(HEADER.pack(request, flags, length) + payload, fds)

    def receive(self) -> Message:
        """One message. Raises HungUp or TimeoutError."""
        return read_message(self.socket)

    def hung_up(self) -> bool:
        """Wait for the end of the connection; True if it came, False if a message came first."""
        try:
            message = self.receive()
        except HungUp:
            return True
        close_all(message.fds)
        return False

    # ---- the three ways to say something -------------------------------------------

    def ask(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """A message that always has an answer."""
        self.send(request, payload, fds)
        reply = self.receive()
        if reply.request != request or reply.flags != VERSION | FLAG_REPLY:
            raise AssertionError(f"{request!r} was answered by {reply!r}")
        return reply

    def ask_u64(self, request: Request) -> int:
        (value,) = struct.unpack("=Q", self.ask(request).payload)
        return int(value)

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without an answer of its own: acknowledged if REPLY_ACK is negotiated."""
        if not self.has(Protocol.REPLY_ACK):
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, flags=VERSION | FLAG_NEED_REPLY)
        reply = self.receive()
        if reply.request != request or reply.flags != VERSION | FLAG_REPLY:
            raise AssertionError(f"{request!r} was acknowledged by {reply!r}")
        (code,) = struct.unpack("=Q", reply.payload)
        if code != 0:
            raise Refused(f"{request.name}: {code:#x}")

    def has(self, feature: Protocol) -> bool:
        return bool(self.protocol_features >> feature & 1)

    # ---- negotiation -----------------------------------------------------------------

    def get_features(self) -> int:
        return self.ask_u64(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.tell(Request.SET_FEATURES, struct.pack("=Q", features))
        self.features = features

    def get_protocol_features(self) -> int:
        return self.ask_u64(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", features))
        self.protocol_features = features

    def set_owner(self) -> None:
        self.tell(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.tell(Request.RESET_OWNER)

    def get_queue_num(self) -> int:
        return self.ask_u64(Request.GET_QUEUE_NUM)

    def set_backend_req_fd(self) -> socket.socket:
        """Open the channel back to us; returns our end of it."""
        ours, theirs = socket.socketpair()
        ours.settimeout(self.socket.gettimeout())
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        return ours

    # ---- device ----------------------------------------------------------------------

    def get_config(self, offset: int = 0, size: int = 60) -> bytes:
        """Configuration space; empty when the back end refuses (payload of length 0)."""
        head = struct.pack("=III", offset, size, 0)
        reply = self.ask(Request.GET_CONFIG, head + bytes(size)).payload
        return reply[12:]

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        head = struct.pack("=III", offset, len(data), flags)
        self.tell(Request.SET_CONFIG, head + data)

    def get_status(self) -> int:
        return self.ask_u64(Request.GET_STATUS)

    def set_status(self, status: int) -> None:
        self.tell(Request.SET_STATUS, struct.pack("=Q", status))

    def reset_device(self) -> None:
        self.tell(Request.RESET_DEVICE)

    # ---- requests in flight ------------------------------------------------------------

    def get_inflight_fd(self, num_queues: int, queue_size: int, *, padding: int = 4) -> Inflight:
        payload = struct.pack("=QQHH", 0, 0, num_queues, queue_size) + bytes(padding)
        reply = self.ask(Request.GET_INFLIGHT_FD, payload)
        if len(reply.payload) != len(payload) or len(reply.fds) != 1:
            raise AssertionError(f"GET_INFLIGHT_FD was answered by {reply!r}")
        return Inflight(reply.fds[0], *struct.unpack_from("=QQHH", reply.payload))

    def set_inflight_fd(self, region: Inflight, *, padding: int = 4) -> None:
        payload = struct.pack("=QQHH", *region[1:]) + bytes(padding)
        self.tell(Request.SET_INFLIGHT_FD, payload, [region.fd])

    # ---- memory ----------------------------------------------------------------------

    def set_mem_table(self, memory: GuestMemory | Sequence[GuestRegion]) -> None:
        regions = memory.regions if isinstance(memory, GuestMemory) else memory
        payload = struct.pack("=II", len(regions), 0)
        payload += b"".join(region_bytes(region) for region in regions)
        self.tell(Request.SET_MEM_TABLE, payload, [region.fd for region in regions])

    def get_max_mem_slots(self) -> int:
        return self.ask_u64(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: GuestRegion) -> None:
        payload = bytes(8) + region_bytes(region)
        self.tell(Request.ADD_MEM_REG, payload, [region.fd])

    def rem_mem_reg(self, region: GuestRegion) -> None:
        self.tell(Request.REM_MEM_REG, bytes(8) + region_bytes(region))

    # ---- migration -------------------------------------------------------------------

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        """With LOG_SHMFD this has an answer, whose payload nobody defines."""
        self.ask(Request.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd])

    def set_log_fd(self, fd: int) -> None:
        self.tell(Request.SET_LOG_FD, fds=[fd])

    # ---- rings -----------------------------------------------------------------------

    def _vring_state(self, request: Request, index: int, value: int) -> None:
        self.tell(request, struct.pack("=II", index, value))

    def set_vring_num(self, index: int, size: int) -> None:
        self._vring_state(Request.SET_VRING_NUM, index, size)

    def set_vring_base(self, index: int, base: int) -> None:
        self._vring_state(Request.SET_VRING_BASE, index, base)

    def set_vring_enable(self, index: int, enable: bool = True) -> None:
        self._vring_state(Request.SET_VRING_ENABLE, index, int(enable))

    def get_vring_base(self, index: int) -> int:
        reply = self.ask(Request.GET_VRING_BASE, struct.pack("=II", index, 0))
        echoed, base = struct.unpack("=II", reply.payload)
        if echoed != index:
            raise AssertionError(f"asked for the base of ring {index}, got that of {echoed}")
        return int(base)

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, log: int | None = None
    ) -> None:
        """``log``: the used ring's guest address; given, the ring's own writes are logged."""
        flags = 0 if log is None else 1
        payload = struct.pack("=IIQQQQ", index, flags, desc, used, avail, log or 0)
        self.tell(Request.SET_VRING_ADDR, payload)

    def _vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        value = index if fd is not None else index | NO_FD
        self.tell(request, struct.pack("=Q", value), [] if fd is None else [fd])

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_ERR, index, fd)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that came with a message nobody wanted."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
