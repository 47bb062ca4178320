"""A client of the RPC socket that sends any bytes and reads whatever comes back.

Context: tests. Never imports drivebay.
"""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType

PATIENCE_S = 30.0


class RawClient:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(path))
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_line(self) -> str:
        """The next answer, without its newline. Raises: EOFError."""
        while b"\n" not in self._buffer:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError(f"the connection ended after {self._buffer!r}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def read_rest(self) -> str:
        """Say that nothing more is sent; everything that is answered until the target hangs up."""
        self.socket.shutdown(socket.SHUT_WR)
        pieces = [self._buffer]
        while chunk := self.socket.recv(65536):
            pieces.append(chunk)
        self._buffer = b""
        return b"".join(pieces).decode()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()


def exchange(path: Path, data: bytes) -> str:
    """Send on a connection of its own; all that is answered."""
    with RawClient(path) as client:
        client.send(data)
        return client.read_rest()
