"""The front end's end of a vhost-user socket: messages and their answers.

Context: control; every call blocks, for at most ``timeout_s``. What the target
sends is checked: version, reply flag, request and size of each answer.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final, Self

from drivebay.errors import HostError, PeerError, UsageError
from drivebay.wire.vhost_user import (
    HEADER_BYTES,
    MAX_FDS,
    VHOST_USER_F_PROTOCOL_FEATURES,
    ConfigAccess,
    HeaderFlag,
    ProtocolFeature,
    Request,
    VringState,
    pack_message,
    pack_u64,
)

__all__ = ["CannotConnect", "Connection", "TargetGone"]

MAX_ANSWER_BYTES: Final = 4096
_HEADER: Final = struct.Struct("=III")
# Which size of the device's configuration a target answers differs: QEMU 7.2's
# storage daemon knows 60 bytes and refuses more, others ask for all 256.
_CONFIG_SIZES: Final = (60, 256)


class CannotConnect(HostError):
    """Nothing serves the socket."""


class TargetGone(PeerError):
    """The target closed the socket, or answers no more."""


def _connect(path: str, timeout_s: float) -> socket.socket:
    """Connect to a target. Raises: CannotConnect, UsageError with what to do about it."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(timeout_s)
    try:
        peer.connect(path)
    except OSError as error:
        peer.close()
        if error.errno is None:  # Python's own check of the length
            raise UsageError(
                f"the socket path is {len(os.fsencode(path))} bytes long (at most 107 fit)",
                field="socket",
                hint="use a shorter path, or a relative one",
            ) from error
        raise CannotConnect(
            f"cannot connect to '{path}'", error.errno, path=path, hint=_connect_hint(path, error)
        ) from error
    return peer


def _connect_hint(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "start the target, and create the controller whose name is the socket's"
    if error.errno == errno.ECONNREFUSED:
        return "nothing listens there: the file is left over, or is not a socket"
    if error.errno == errno.EACCES:
        return f"see the owner and mode with: ls -l {path}"
    return "a vhost-user target must listen on this socket"


class Connection:
    """Messages to one target. Not for several threads at once."""

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self.path = path
        self.reply_ack = False
        self._timeout_s = timeout_s
        self._socket = _connect(path, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def gone(self) -> bool:
        """Has the target closed its end, or have we? Never blocks."""
        if self._socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLRDHUP)
        return any(
            events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR)
            for _, events in poll.poll(0)
        )

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message without an answer of its own; with REPLY_ACK wait for the target's yes.

        Raises: PeerError when the target refuses it, TargetGone.
        """
        self._write(request, payload, HeaderFlag.NEED_REPLY if self.reply_ack else 0, fds)
        if self.reply_ack:
            code = self._u64(request, self._read_answer(request))
            if code:
                raise PeerError(f"the target refused {request.name} (answer {code:#x})")

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """Send a message that is always answered; returns the answer's payload."""
        self._write(request, payload, 0, ())
        return self._read_answer(request)

    def ask_fd(self, request: Request, payload: bytes) -> tuple[bytes, int | None]:
        """The same for an answer that brings a descriptor, which is the caller's then."""
        self._write(request, payload, 0, ())
        fds: list[int] = []
        try:
            answer = self._read_answer(request, fds)
        except PeerError:
            for fd in fds:
                os.close(fd)
            raise
        for fd in fds[1:]:
            os.close(fd)
        return answer, fds[0] if fds else None

    def ask_u64(self, request: Request) -> int:
        return self._u64(request, self.ask(request))

    def stop_vring(self, index: int) -> int:
        """GET_VRING_BASE: the target is done with the ring; returns its next avail index."""
        answer = self.ask(Request.GET_VRING_BASE, VringState(index, 0).pack())
        return VringState.parse(answer).num

    def get_config(self) -> bytes:
        """The device's configuration, as much of it as the target tells. Raises: PeerError."""
        for size in _CONFIG_SIZES:
            asked = ConfigAccess(0, size, 0, bytes(size)).pack()
            answer = self.ask(Request.GET_CONFIG, asked)
            if len(answer) == len(asked):
                return answer[-size:]
        raise PeerError(
            f"'{self.path}' answers no GET_CONFIG of {' or '.join(map(str, _CONFIG_SIZES))} bytes"
        )

    def set_config(self, offset: int, data: bytes) -> None:
        self.send(Request.SET_CONFIG, ConfigAccess(offset, len(data), 0, data).pack())

    def negotiate(
        self, wanted_features: int, wanted_protocol: ProtocolFeature
    ) -> tuple[int, ProtocolFeature]:
        """Take of the wanted features what is offered; returns virtio and protocol features.

        The virtio features are not set yet: what they shall be may depend on the configuration.
        """
        offered = self.ask_u64(Request.GET_FEATURES)
        protocol = ProtocolFeature(0)
        if offered >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            protocol = ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES))
            protocol &= wanted_protocol
            self.send(Request.SET_PROTOCOL_FEATURES, pack_u64(protocol))
            self.reply_ack = ProtocolFeature.REPLY_ACK in protocol
        self.send(Request.SET_OWNER)
        return offered & wanted_features, protocol

    def _u64(self, request: Request, payload: bytes) -> int:
        if len(payload) != 8:
            raise PeerError(
                f"the target answers {request.name} with {len(payload)} bytes (must be 8)"
            )
        return int.from_bytes(payload, "little")

    def _write(self, request: Request, payload: bytes, flags: int, fds: Sequence[int]) -> None:
        message = pack_message(request, payload, flags)
        ancillary = []
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            sent = self._socket.sendmsg([message], ancillary)
            if sent < len(message):
                self._socket.sendall(message[sent:])
        except OSError as error:
            raise self._gone(f"while {request.name} was sent", error) from error

    def _read_answer(self, request: Request, fds: list[int] | None = None) -> bytes:
        number, flags, size = _HEADER.unpack(self._read(request, HEADER_BYTES, fds))
        if flags & 3 != 1 or not flags & HeaderFlag.REPLY or size > MAX_ANSWER_BYTES:
            raise PeerError(
                f"'{self.path}' does not speak vhost-user: it answers {request.name} "
                f"with request {number}, flags {flags:#x}, {size} bytes"
            )
        if number != request:
            raise PeerError(f"the target answers {request.name} with request {number}")
        return self._read(request, size, fds)

    def _read(self, request: Request, size: int, fds: list[int] | None = None) -> bytes:
        """Read so many bytes; descriptors that come with them go to ``fds``, or are dropped."""
        data = bytearray()
        while len(data) < size:
            try:
                part = self._receive(size - len(data), fds)
            except OSError as error:
                raise self._gone(f"while {request.name} waited for its answer", error) from error
            if not part:
                raise self._gone(f"instead of answering {request.name}", None)
            data += part
        return bytes(data)

    def _receive(self, size: int, fds: list[int] | None) -> bytes:
        if fds is None:
            return self._socket.recv(size)
        part, new, _, _ = socket.recv_fds(self._socket, size, MAX_FDS)
        fds += new
        return part

    def _gone(self, moment: str, error: OSError | None) -> TargetGone:
        if isinstance(error, TimeoutError):
            return TargetGone(
                f"'{self.path}' did not answer within {self._timeout_s:g} s {moment}",
                hint="is it a vhost-user socket?",
            )
        cause = f" ({os.strerror(error.errno)})" if error is not None and error.errno else ""
        return TargetGone(
            f"the target closed '{self.path}' {moment}{cause}", hint="the target's log says why"
        )
