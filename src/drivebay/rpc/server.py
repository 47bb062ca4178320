"""The RPC socket: who may listen on it, and one task for each client.

Context: control. A client is answered in the order of its requests and never holds up
another one. What a client makes us keep is bounded: at most one request, one answer, and
it is cut off when it does not read its answer.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.errors import HostError, InUse, UsageError
from drivebay.rpc.dispatch import Dispatcher
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, ParseFault, RpcError, StreamParser, encode_error

if TYPE_CHECKING:
    from drivebay.target.target import Target

__all__ = ["RpcServer"]

_log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
PATH_LIMIT: Final = 107
# Small enough that cutting a hostile chunk into requests stays under a millisecond.
_CHUNK_BYTES: Final = 4096
_UNREAD_ANSWER_S: Final = 60.0


class RpcServer:
    """Listens on a path that it holds by a lock on PATH.lock, as SPDK does."""

    def __init__(
        self,
        target: Target,
        path: str,
        allowed: frozenset[str] | None = None,
        *,
        mode: int = 0o600,
        group: int | None = None,
    ) -> None:
        self.dispatcher = Dispatcher(target, allowed)
        self._path = path
        self._mode = mode
        self._group = group
        self._lock_fd = -1
        self._bound = False
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    def claim(self) -> None:
        """Take the path for this process, before anything else is started.

        Raises: UsageError, InUse, HostError.
        """
        length = len(os.fsencode(self._path))
        if length > PATH_LIMIT:
            raise UsageError(
                f"the path of the RPC socket is {length} bytes long, a socket address holds at "
                f"most {PATH_LIMIT}: '{self._path}'",
                hint="name a shorter one with -r",
            )
        self._lock_fd = _take_lock(self._path)
        try:
            _remove_stale_socket(self._path)
        except BaseException:
            self._drop_lock()
            raise

    async def listen(self) -> None:
        """Begin to answer. Raises: HostError."""
        if self._lock_fd < 0:
            self.claim()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)  # no moment in which others could connect
        try:
            listener.bind(self._path)
            self._bound = True
            Path(self._path).chmod(self._mode)
            if self._group is not None:
                os.chown(self._path, -1, self._group)
            self._server = await asyncio.start_unix_server(
                self._serve, sock=listener, backlog=MAX_CONNECTIONS, limit=_CHUNK_BYTES
            )
        except OSError as error:
            listener.close()
            raise HostError(
                f"can't listen on the RPC socket '{self._path}'",
                error.errno or errno.EIO,
                path=self._path,
                hint="name another path with -r",
            ) from error
        finally:
            os.umask(mask)

    async def close(self) -> None:
        """Cut the clients off and leave no file behind."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for client in list(self._clients):
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        if self._bound:
            Path(self._path).unlink(missing_ok=True)
            self._bound = False
        self._drop_lock()

    def _drop_lock(self) -> None:
        if self._lock_fd >= 0:
            Path(f"{self._path}.lock").unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= MAX_CONNECTIONS:
            refusal = RpcError(
                INTERNAL_ERROR, f"there are {MAX_CONNECTIONS} clients already, and no more may be"
            )
            writer.write(encode_error(None, refusal) + b"\n")
            writer.close()
            return
        self._clients.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, TimeoutError):
            writer.transport.abort()  # the client is gone, or does not read
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._clients.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = StreamParser()
        hung_up = _hangup_test(writer)
        while chunk := await reader.read(_CHUNK_BYTES):
            parser.feed(chunk)
            while True:
                answer: bytes | None
                try:
                    value = parser.next_value()
                    if value is None:
                        break
                    answer = await self.dispatcher.answer(value, hung_up)
                except ParseFault as fault:
                    answer = self.dispatcher.parse_error(fault)
                if answer is None:
                    await asyncio.sleep(0)
                    continue
                writer.write(answer + b"\n")
                async with asyncio.timeout(_UNREAD_ANSWER_S):
                    await writer.drain()
                await asyncio.sleep(0)


def _hangup_test(writer: asyncio.StreamWriter) -> Callable[[], bool]:
    """A client that sends and then shuts its half still reads; one that closed does not."""
    poller = select.poll()
    connection = writer.get_extra_info("socket")
    poller.register(connection.fileno(), 0)  # POLLHUP and POLLERR are always reported

    def hung_up() -> bool:
        return writer.is_closing() or bool(poller.poll(0))

    return hung_up


def _take_lock(path: str) -> int:
    """Hold PATH.lock until the descriptor is closed. Bound: 16 races with one that ends."""
    lock_path = f"{path}.lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(16):
        try:
            descriptor = os.open(lock_path, flags, 0o600)
        except OSError as error:
            raise HostError(
                f"can't open the lock '{lock_path}' of the RPC socket",
                error.errno or errno.EIO,
                path=lock_path,
                hint="name another socket with -r",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).split(b"\n")[0].decode("ascii", "replace")
            os.close(descriptor)
            who = f" (pid {holder})" if holder.isdigit() else ""
            raise InUse(
                f"the RPC socket '{path}' belongs to another running target{who}",
                hint="end that one, or name another socket with -r",
            ) from error
        if _is_at(descriptor, lock_path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            return descriptor
        os.close(descriptor)  # its owner ended and removed it meanwhile
    raise InUse(f"the RPC socket '{path}' changes hands all the time")


def _is_at(descriptor: int, path: str) -> bool:
    ours = os.fstat(descriptor)
    try:
        there = os.stat(path)  # noqa: PTH116 - compared with fstat's
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _remove_stale_socket(path: str) -> None:
    """Under the lock: remove a socket that nobody listens on. Raises: UsageError, InUse."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(
            "can't look at the RPC socket", error.errno or errno.EIO, path=path
        ) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(
            f"'{path}' exists and is not a socket", hint="remove it, or name another path with -r"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result in (0, errno.EAGAIN):
        raise InUse(
            f"another program listens on the RPC socket '{path}'",
            hint="end it, or name another socket with -r",
        )
    try:
        Path(path).unlink()
    except OSError as error:
        raise HostError(
            f"can't remove the stale RPC socket '{path}'", error.errno or errno.EIO, path=path
        ) from error
