"""Commands for a guest, over its second serial port: the host's side of ``data/init.sh``.

Context: any thread, one at a time. The guest is not trusted: what it says is bounded, and
a guest that says nothing ends in a time-out.

    ┌───────┐ "ready UPTIME"  ┌───────┐ base64 command ──►  ┌─────────┐
    │ BOOT  │ ───────────────►│ READY │                     │ RUNNING │
    └───────┘                 └───────┘ ◄── "done CODE LEN" └─────────┘
"""

from __future__ import annotations

import base64
import errno as errno_codes
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from drivebay.errors import DrivebayError, HostError, PeerError

__all__ = ["GuestAgent", "GuestOutput", "GuestSilent"]

OUTPUT_LIMIT = 4 << 20
LINE_LIMIT = 4096


class GuestSilent(DrivebayError):
    """The guest did not answer in time: it hangs, or the host is too busy."""

    errno = errno_codes.ETIMEDOUT


@dataclass(frozen=True)
class GuestOutput:
    """What a command in the guest left: its exit code, and output and errors together."""

    code: int
    text: str


class GuestAgent:
    """The connection to one guest; lasts over its reboots."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._received = bytearray()
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def wait_ready(self, timeout_s: float) -> float:
        """Wait until the guest has booted; return its uptime in seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._line(deadline, f"the guest did not boot within {timeout_s:g} s")
            match = re.search(r"ready (\d+\.\d+)$", line)
            if match is not None:
                return float(match.group(1))

    def run(self, script: str, timeout_s: float) -> GuestOutput:
        """Run a shell script in the guest, and wait for its end."""
        deadline = time.monotonic() + timeout_s
        late = f"the guest did not finish {script.strip()[:60]!r} within {timeout_s:g} s"
        self.send(script)
        line = self._line(deadline, late)
        match = re.fullmatch(r"done (\d{1,3}) (\d{1,8})", line)
        if match is None:
            raise PeerError(f"the guest answered {line[:80]!r}, not 'done CODE LENGTH'")
        length = int(match.group(2))
        if length > OUTPUT_LIMIT:
            raise PeerError(f"the guest printed {length} bytes, at most {OUTPUT_LIMIT} are taken")
        while len(self._received) < length:
            self._receive(deadline, late)
        text = self._received[:length].decode(errors="replace")
        del self._received[:length]
        return GuestOutput(int(match.group(1)), text)

    def send(self, script: str) -> None:
        """Send a script without waiting for an answer: it ends or restarts the guest."""
        try:
            self._socket.sendall(base64.b64encode(script.encode()) + b"\n")
        except OSError as error:
            raise HostError("cannot send a command to the guest", error.errno or 0) from error

    def _line(self, deadline: float, late: str) -> str:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > LINE_LIMIT:
                raise PeerError(f"the guest sent a line of more than {LINE_LIMIT} bytes")
            self._receive(deadline, late)
        line = self._received[:end].decode(errors="replace").strip("\r\0 ")
        del self._received[: end + 1]
        return line

    def _receive(self, deadline: float, late: str) -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self._socket.recv(65536)
        except TimeoutError as error:
            raise GuestSilent(late) from error
        except OSError as error:
            raise HostError("lost the guest", error.errno or 0) from error
        if not data:
            raise PeerError("QEMU ended while the guest was at work")
        self._received += data
