"""A blocking client of the RPC socket, for the command line and the VM tool.

Context: a process other than the target, or a worker thread. Imports next to nothing, as
each command pays for it. One call at a time; answers come in order.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from drivebay.errors import HostError, PeerError
from drivebay.rpc.jsonrpc import MAX_ANSWER_BYTES, RpcError

__all__ = ["Client", "RpcError"]

_CHUNK_BYTES: Final = 65536


class Client:
    """A connection to the target behind ``path``."""

    def __init__(self, path: str, timeout_s: float = 60.0) -> None:
        """Connect. Raises: HostError whose sentence says why not and what helps."""
        self.path = path
        self._last_id = 0
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            # A path that is too long never reaches the kernel and has no errno.
            raise _unreachable(path, error.errno or errno.ENAMETOOLONG) from error

    def call(self, method: str, params: dict[str, Any] | list[Any] | None = None) -> Any:
        """Return the method's result.

        Raises: RpcError when the target refuses, HostError when it does not answer in
        time, PeerError when it ends or answers nonsense.
        """
        self._last_id += 1
        request: dict[str, Any] = {"jsonrpc": "2.0", "id": self._last_id, "method": method}
        if params:
            request["params"] = params
        try:
            self._socket.sendall(json.dumps(request).encode("utf-8"))
            answer = self._receive(method)
            while self._is_late(answer):
                answer = self._receive(method)
        except TimeoutError as error:
            waited = f"'{method}' was not answered within {self._socket.gettimeout():g} s"
            raise HostError(waited, errno.ETIMEDOUT, path=self.path) from error
        except OSError as error:
            code = error.errno or errno.EIO
            raise HostError("the connection to the target broke", code, path=self.path) from error
        return self._result(method, answer)

    def _receive(self, method: str) -> Any:
        """An answer is one line; the server never breaks it."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_ANSWER_BYTES:
                raise PeerError(f"the answer to '{method}' exceeds {MAX_ANSWER_BYTES} bytes")
            chunk = self._socket.recv(_CHUNK_BYTES)
            if not chunk:
                raise PeerError(
                    f"the target ended the connection without an answer to '{method}'",
                    hint="look at the target's log",
                )
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return json.loads(line)
        except ValueError as error:
            raise PeerError(f"the answer to '{method}' is not JSON: {error}") from error

    def _is_late(self, answer: Any) -> bool:
        """Whether it answers an earlier call, whose caller was interrupted (Ctrl-C)."""
        number = answer.get("id") if isinstance(answer, dict) else None
        return type(number) is int and number < self._last_id

    def _result(self, method: str, answer: Any) -> Any:
        if not isinstance(answer, dict):
            raise PeerError(f"the answer to '{method}' is not an object")
        error = answer.get("error")
        if isinstance(error, dict):
            raise RpcError(int(error["code"]), str(error["message"]), error.get("data"))
        if answer.get("id") != self._last_id or "result" not in answer:
            raise PeerError(f"what came back is not the answer to '{method}'")
        return answer["result"]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _unreachable(path: str, code: int) -> HostError:
    """Say why a socket can't be reached, with its owner and mode, and what helps."""
    what = f"can't reach a target at '{path}'"
    hint = "start one with 'drivebay target start', or name its socket"
    try:
        found = Path(path).stat()
    except OSError:
        return HostError(what, code, path=path, hint=hint)
    shown = f"owner {_user(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):04o}"
    if not stat.S_ISSOCK(found.st_mode):
        shown += ", which is not a socket"
    elif code == errno.EACCES:
        hint = f"run this as {_user(found.st_uid)}, not as {_user(os.geteuid())}"
    elif code == errno.ECONNREFUSED:
        shown += "; nobody listens there any more"
    return HostError(f"{what} ({shown})", code, path=path, hint=hint)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
