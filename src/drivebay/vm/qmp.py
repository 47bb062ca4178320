"""QEMU's monitor: one command, one answer, as lines of JSON.

Context: any thread, one at a time. Events are skipped: what a caller wants to know it asks.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from drivebay.errors import DrivebayError, HostError, PeerError

__all__ = ["Qmp", "QmpRefused"]

COMMAND_SECONDS: Final = 30.0
LINE_LIMIT: Final = 1 << 20


class QmpRefused(DrivebayError):
    """QEMU says why it did not do what it was asked."""

    errno = errno.EINVAL


class Qmp:
    """A connection to the monitor of one QEMU, which serves one connection at a time."""

    def __init__(self, path: Path, timeout_s: float = COMMAND_SECONDS) -> None:
        """Raises: OSError while there is no such socket; HostError, PeerError."""
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises: QmpRefused, HostError, PeerError.
        """
        told = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": told}).encode() + b"\n"
        deadline = time.monotonic() + self._timeout_s
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.sendall(line)
        except OSError as error:
            raise HostError(f"cannot send '{command}' to QEMU", error.errno or 0) from error
        while True:
            answer = self._message(deadline, command)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpRefused(f"QEMU refused '{command}': {answer['error'].get('desc')}")

    def _connect(self, path: Path) -> None:
        self._socket.settimeout(self._timeout_s)
        self._socket.connect(str(path))
        greeting = self._message(time.monotonic() + self._timeout_s, "its greeting")
        if "QMP" not in greeting:
            raise PeerError(f"QEMU's monitor began with {str(greeting)[:80]!r}, not a greeting")
        self.call("qmp_capabilities")

    def _message(self, deadline: float, awaited: str) -> dict[str, Any]:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > LINE_LIMIT:
                raise PeerError(f"QEMU's monitor sent a line of more than {LINE_LIMIT} bytes")
            self._receive(deadline, awaited)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise PeerError(f"QEMU's monitor sent {line[:80]!r}, which is no JSON") from error
        if not isinstance(message, dict):
            raise PeerError(f"QEMU's monitor sent {line[:80]!r}, which is no object")
        return message

    def _receive(self, deadline: float, awaited: str) -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self._socket.recv(65536)
        except OSError as error:  # a time-out is one, too
            raise HostError(
                f"QEMU's monitor did not answer ({awaited})", error.errno or errno.ETIMEDOUT
            ) from error
        if not data:
            raise PeerError(f"QEMU ended before it answered ({awaited})")
        self._received += data
