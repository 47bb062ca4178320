"""The QEMU guest agent: freezing file systems, running programs, asking for addresses.

Context: any thread, one at a time. The guest is not trusted: what it says is bounded and
checked, and a guest that says nothing ends in a time-out.

The port is there whether or not an agent listens in the guest, and old answers may still be in
it. So each connection begins with a byte that makes the agent forget a half-read command,
and a number; all that comes before the same number is thrown away. After a time-out that is
done again.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno as errno_codes
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from drivebay.errors import DrivebayError, HostError, PeerError

__all__ = ["Agent", "AgentInfo", "AgentRefused", "AgentSilent", "Interface", "Output"]

ANSWER_SECONDS: Final = 10.0
FREEZE_SECONDS: Final = 60.0  # a guest under load writes out what it has first
# The agent cuts off output at 16 MiB, and sends two of them in base64.
LINE_MOST: Final = 48 << 20
DELIMITER: Final = b"\xff"
POLL_SECONDS: Final = (0.02, 0.5)  # how often a program's end is asked for: at first, later
INSTALL_HINT: Final = (
    "install it in the guest: sudo apt install qemu-guest-agent   "
    "(Fedora, AlmaLinux, openEuler: sudo dnf install qemu-guest-agent)"
)


class AgentSilent(DrivebayError):
    """No agent answers: there is none in the guest, or the guest hangs."""

    errno = errno_codes.ETIMEDOUT


class AgentRefused(DrivebayError):
    """The agent says why it did not do what it was asked."""

    errno = errno_codes.EINVAL


@dataclass(frozen=True)
class AgentInfo:
    """Which agent it is, and the commands that it obeys."""

    version: str
    commands: frozenset[str]


@dataclass(frozen=True)
class Output:
    """What a program in the guest left; 128 + N is the code of one that signal N ended."""

    code: int
    out: bytes
    err: bytes
    truncated: bool  # the agent cut off what was more


@dataclass(frozen=True)
class Interface:
    """A network interface as the guest sees it."""

    name: str
    mac: str
    addresses: tuple[str, ...]


class Agent:
    """A connection to the agent of one guest; its port serves one connection at a time."""

    def __init__(self, path: Path, timeout_s: float = ANSWER_SECONDS) -> None:
        """Connect, and wait until the agent answers.

        Raises: AgentSilent, HostError, PeerError.
        """
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._searched = 0  # that far there is no end of a line
        self._in_step = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            try:
                self._socket.connect(str(path))
            except OSError as error:
                code = error.errno or errno_codes.EIO
                raise HostError(
                    "can't reach the guest agent's port", code, path=str(path)
                ) from error
            self._synchronize(timeout_s)
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

    # ---- commands -------------------------------------------------------------------------------

    def call(self, command: str, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises: AgentRefused, AgentSilent, HostError, PeerError.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._in_step:
            self._synchronize(timeout_s)
        self._in_step = False
        self._send(command, arguments)
        answer = self._answer(time.monotonic() + timeout_s, command)
        self._in_step = True
        if "error" in answer:
            raise _refusal(command, answer["error"])
        if "return" not in answer:
            raise PeerError(f"the guest agent answered '{command}' with {str(answer)[:80]!r}")
        return answer["return"]

    def ping(self) -> None:
        """Raises: AgentSilent when the agent has gone."""
        self.call("guest-ping")

    def info(self) -> AgentInfo:
        """Return the agent's version and what it can do."""
        answer = _dict(self.call("guest-info"), "guest-info")
        commands = _list(answer.get("supported_commands"), "guest-info")
        return AgentInfo(
            _text(answer.get("version"), "guest-info")[:80],
            frozenset(
                _text(command.get("name"), "guest-info")[:80]
                for command in (_dict(item, "guest-info") for item in commands)
                if command.get("enabled") is True
            ),
        )

    def freeze(self) -> int:
        """Write out all file systems and hold them still; return how many they are."""
        return _number(self.call("guest-fsfreeze-freeze", FREEZE_SECONDS), "guest-fsfreeze-freeze")

    def thaw(self) -> int:
        """Let the guest write again. Harmless when nothing is frozen."""
        return _number(self.call("guest-fsfreeze-thaw", FREEZE_SECONDS), "guest-fsfreeze-thaw")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[int]:
        """Hold all file systems still while the block runs, and never longer.

        Raises: as `freeze`, after which nothing is frozen; DrivebayError when the guest may
        have stayed frozen.
        """
        try:
            count = self.freeze()
        except DrivebayError:
            self._thaw_surely()  # some may be frozen, or will be when the guest goes on
            raise
        try:
            yield count
        finally:
            self._thaw_surely()

    def _thaw_surely(self) -> None:
        for attempt in (1, 2):
            try:
                self.thaw()
                return
            except AgentRefused:
                return  # it has no freezing at all
            except DrivebayError as error:
                if attempt == 2:
                    raise DrivebayError(
                        f"the guest's file systems may have stayed frozen: {error}",
                        hint="run 'fsfreeze --unfreeze MOUNTPOINT' in the guest, or restart it",
                    ) from error

    def run(self, words: Sequence[str], timeout_s: float, stdin: bytes = b"") -> Output:
        """Run a program in the guest as its root, without a shell, and wait for its end.

        Raises: AgentSilent when it does not end in time (it goes on), and as `call`.
        """
        deadline = time.monotonic() + timeout_s
        started = self.call(
            "guest-exec",
            path=words[0],
            arg=list(words[1:]),
            input_data=base64.b64encode(stdin).decode(),
            capture_output=True,
        )
        pid = _number(_dict(started, "guest-exec").get("pid"), "guest-exec")
        pause = POLL_SECONDS[0]
        while True:
            status = _dict(self.call("guest-exec-status", pid=pid), "guest-exec-status")
            if status.get("exited") is True:
                return _output(status)
            if time.monotonic() + pause > deadline:
                raise AgentSilent(
                    f"'{words[0][:80]}' did not end within {timeout_s:g} s; in the guest it "
                    f"goes on as process {pid}"
                )
            time.sleep(pause)
            pause = min(pause * 2, POLL_SECONDS[1])

    def run_script(self, script: str, timeout_s: float) -> Output:
        """Run a shell script in the guest as its root, and wait for its end."""
        return self.run(["/bin/sh", "-s"], timeout_s, script.encode())

    def network_addresses(self) -> list[Interface]:
        """Return the guest's interfaces but for its loopback."""
        command = "guest-network-get-interfaces"
        found = []
        for item in _list(self.call(command), command):
            interface = _dict(item, command)
            addresses = []
            for entry in _list(interface.get("ip-addresses", []), command):
                text = _text(_dict(entry, command).get("ip-address"), command)
                try:
                    addresses.append(ipaddress.ip_address(text))
                except ValueError:
                    raise PeerError(f"the guest says that {text[:80]!r} is its address") from None
            if not any(address.is_loopback for address in addresses):
                name = _text(interface.get("name"), command)[:80]
                mac = _text(interface.get("hardware-address", ""), command)[:80]
                found.append(Interface(name, mac, tuple(map(str, addresses))))
        return found

    def shutdown(self) -> None:
        """Ask the guest to power off. It says nothing when it does."""
        self._send("guest-shutdown", {"mode": "powerdown"})
        self._in_step = False

    # ---- lines ----------------------------------------------------------------------------------

    def _synchronize(self, timeout_s: float) -> None:
        """Forget what is half said, on both sides."""
        number = secrets.randbelow(1 << 53)
        deadline = time.monotonic() + timeout_s
        self._send("guest-sync-delimited", {"id": number}, DELIMITER)
        while True:
            # The port may hold anything from before: it counts for nothing.
            with contextlib.suppress(_NotJson):
                line = self._line(deadline, "guest-sync-delimited")
                if _parsed(line.rpartition(DELIMITER)[2]).get("return") == number:
                    self._in_step = True
                    return

    def _answer(self, deadline: float, command: str) -> dict[str, Any]:
        line = self._line(deadline, command)
        try:
            return _parsed(line)
        except _NotJson as error:
            raise PeerError(f"the guest agent answered '{command}' with {line[:80]!r}") from error

    def _send(self, command: str, arguments: dict[str, Any], before: bytes = b"") -> None:
        told = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": told}).encode() + b"\n"
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.sendall(before + line)
        except TimeoutError as error:
            raise _silence(command) from error
        except OSError as error:
            raise HostError(
                f"can't send '{command}' to the guest agent", error.errno or 0
            ) from error

    def _line(self, deadline: float, command: str) -> bytes:
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            if self._searched > LINE_MOST:
                raise PeerError(f"the guest agent sent a line of more than {LINE_MOST} bytes")
            self._receive(deadline, command)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return line

    def _receive(self, deadline: float, command: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:  # also for a guest that always says something
            raise _silence(command)
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(1 << 18)
        except TimeoutError as error:
            raise _silence(command) from error
        except OSError as error:
            raise HostError("lost the guest agent's port", error.errno or 0) from error
        if not data:
            raise PeerError(f"QEMU ended before the guest agent answered '{command}'")
        self._received += data


class _NotJson(ValueError):
    """A line is no JSON object."""


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _NotJson from error
    if not isinstance(value, dict):
        raise _NotJson
    return value


def _silence(command: str) -> AgentSilent:
    return AgentSilent(
        f"no guest agent answers ('{command}'): the guest is still starting, or has none",
        hint=INSTALL_HINT,
    )


def _refusal(command: str, error: object) -> AgentRefused:
    said = error.get("desc") if isinstance(error, dict) else None
    words = said[:300] if isinstance(said, str) else "without a reason"
    blocked = "has been disabled" in words and "frozen" not in words
    return AgentRefused(
        f"the guest agent refused '{command}': {words}",
        hint="the guest allows it in /etc/sysconfig/qemu-ga, then: sudo systemctl restart "
        "qemu-guest-agent"
        if blocked
        else None,
    )


# ---- values of an answer ------------------------------------------------------------------------


def _output(status: dict[str, Any]) -> Output:
    command = "guest-exec-status"
    if "signal" in status:
        code = 128 + _number(status["signal"], command)
    else:
        code = _number(status.get("exitcode"), command)
    return Output(
        code,
        _decoded(status.get("out-data", "")),
        _decoded(status.get("err-data", "")),
        status.get("out-truncated") is True or status.get("err-truncated") is True,
    )


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(_text(text, "guest-exec-status"), validate=True)
    except (binascii.Error, ValueError):
        raise _wrong("guest-exec-status", text) from None


def _number(value: object, command: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _wrong(command, value)
    return value


def _text(value: object, command: str) -> str:
    if not isinstance(value, str):
        raise _wrong(command, value)
    return value


def _list(value: object, command: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(command, value)
    return value


def _dict(value: object, command: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(command, value)
    return value


def _wrong(command: str, value: object) -> PeerError:
    return PeerError(f"the guest agent answered '{command}' with {value!r:.80}")
