"""One front end's socket: whole messages in, with their descriptors; replies out.

Context: control, one task per connection. It knows headers and lengths, not
what messages mean. A hang-up is an exception of its own, because it is the
usual end of a session and not an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
from array import array
from typing import Final

from drivebay.errors import DrivebayError, HostError, PeerError
from drivebay.vhost.descriptors import Received
from drivebay.wire.vhost_user import (
    HEADER_BYTES,
    MAX_FDS,
    Header,
    HeaderFlag,
    pack_message,
)

__all__ = ["Connection", "HungUp"]

_FD_BYTES: Final = array("i").itemsize
# Exactly MAX_FDS descriptors fit: the kernel drops any others and says so.
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)


class HungUp(DrivebayError):
    """The front end closed its socket, or we shut it down ourselves."""


class Connection:
    """Messages on one stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    async def receive_header(self, received: Received) -> Header:
        """The next message's header. Raises: HungUp, PeerError."""
        data = await self._receive(HEADER_BYTES, received)
        if not data:
            raise HungUp("the front end hung up")
        if len(data) < HEADER_BYTES:
            raise PeerError(f"the front end hung up after {len(data)} bytes of a message header")
        return Header.parse(data)

    async def receive_payload(self, size: int, received: Received) -> bytes:
        """``size`` bytes, which the state table has found to be allowed. Raises: PeerError."""
        data = await self._receive(size, received)
        if len(data) < size:
            raise PeerError(f"the front end hung up after {len(data)} of {size} bytes of a payload")
        return data

    async def _receive(self, size: int, received: Received) -> bytes:
        """``size`` bytes, or what came before the end of the stream."""
        data = b""
        while len(data) < size:
            await self._readable()
            part = self._receive_part(size - len(data), received)
            if not part:
                break
            data += part
        return data

    def _receive_part(self, size: int, received: Received) -> bytes:
        """What is there now, b"" at the end of the stream. Raises: PeerError, HostError."""
        try:
            data, ancillary, flags, _address = self._sock.recvmsg(
                size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return b""
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.add(array("i", content[: len(content) // _FD_BYTES * _FD_BYTES]))
        if len(received) > MAX_FDS or (flags & socket.MSG_CTRUNC and len(received) == MAX_FDS):
            raise PeerError(f"a message came with more than {MAX_FDS} file descriptors")
        if flags & socket.MSG_CTRUNC:
            raise HostError(
                "cannot take a message's file descriptors", errno.EMFILE, hint="raise 'ulimit -n'"
            )
        return data

    async def _readable(self) -> None:
        """Always gives way to other sessions once, so that none can talk without pause."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        fd = self._sock.fileno()
        loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(fd)

    async def reply(self, request: int, payload: bytes, fd: int = -1) -> None:
        """Send an answer, maybe with a descriptor. Raises: HungUp when nobody takes it."""
        message = pack_message(request, payload, HeaderFlag.REPLY)
        try:
            if fd >= 0:
                message = await self._send_fd(message, fd)
            await asyncio.get_running_loop().sock_sendall(self._sock, message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HungUp("the front end hung up before it read an answer") from error

    async def _send_fd(self, message: bytes, fd: int) -> bytes:
        """Send what fits, with the descriptor; returns the rest."""
        while True:
            try:
                return message[socket.send_fds(self._sock, [message], [fd]) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        number = self._sock.fileno()
        loop.add_writer(number, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_writer(number)

    def try_reply(self, request: int, payload: bytes) -> None:
        """Send a last answer if there is room for it and somebody to read it."""
        message = pack_message(request, payload, HeaderFlag.REPLY)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._sock.send(message, socket.MSG_DONTWAIT)

    def hung_up(self) -> bool:
        """Whether the other side is gone, however much it sent before that."""
        if self._sock.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def shut_down(self) -> None:
        """End it from our side: whoever waits in receive or reply finds a hang-up."""
        with contextlib.suppress(OSError):  # it is closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
