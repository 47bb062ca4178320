"""DHCP clients that are processes of their own: dhclient and udhcpc.

Context: root. The client of the uplink ends *without giving its lease back*, and one with the
same command line starts on the bridge. It has the same MAC, so a server gives it the same
address. networkd and NetworkManager ask for addresses themselves (``managers``).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from drivebay.errors import DrivebayError, StateError
from drivebay.system.processes import start_ticks

__all__ = ["Client", "dhcpcd_serves", "find_clients", "keep", "move_clients", "namespace"]

_KNOWN: Final = ("dhclient", "udhcpc")
_OPTIONS: Final = ("", "-i", "--interface=")  # how an interface is told
_BUSYBOX: Final = "busybox"
_END_SECONDS: Final = 5.0
# A client (udhcpc, networkd) begins by emptying its interface, and has its answer by then.
_ANSWER_SECONDS: Final = 3.0


@dataclass(frozen=True)
class Client:
    """A DHCP client at work on one interface."""

    kind: str
    pid: int
    program: str
    words: list[str]

    def on(self, old: str, new: str) -> Client:
        """The same client for another interface."""
        spelled = {f"{option}{old}": f"{option}{new}" for option in _OPTIONS}
        words = [spelled.get(word, word) for word in self.words]
        return Client(self.kind, 0, self.program, words)

    def serves(self, interface: str) -> bool:
        """Whether it was told this interface."""
        return bool({f"{option}{interface}" for option in _OPTIONS} & set(self.words[1:]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_clients(interface: str) -> list[Client]:
    """The clients that were told this interface, in our network namespace."""
    found = (read_client(process) for process in _processes())
    return [client for client in found if client is not None and client.serves(interface)]


def dhcpcd_serves(interface: str, devices: Collection[str]) -> bool:
    """Whether a dhcpcd looks after this one: it names it, or none of the ``devices``.

    It writes what it does over its own command line, so it can't be started again by that.
    """
    for process in _processes():
        try:
            if process.joinpath("comm").read_text().strip() != "dhcpcd":
                continue
            text = process.joinpath("cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        words = set(re.split(r"[\0\s]+", text))
        if interface in words or not words & set(devices):
            return True
    return False


def _processes() -> Iterator[Path]:
    """Those in our network namespace."""
    ours = namespace("self")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and namespace(entry.name) == ours:
            yield entry


def namespace(pid: str) -> str | None:
    """Which network a process is in."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None


def read_client(process: Path) -> Client | None:
    """What a folder of /proc is about, if it is a DHCP client."""
    try:
        words = process.joinpath("cmdline").read_bytes().decode(errors="surrogateescape")
        program = str(process.joinpath("exe").readlink())
    except OSError:
        return None
    split = words.rstrip("\0").split("\0")
    name = Path(split[0]).name
    if name == _BUSYBOX and len(split) > 1:
        name = split[1]
    if name not in _KNOWN or start_ticks(int(process.name)) is None:
        return None
    return Client(name, int(process.name), program.removesuffix(" (deleted)"), split)


def move_clients(old: str, new: str, clients: list[Client]) -> None:
    """End the clients of ``old`` and start them on ``new``.

    Raises: StateError when one does not end.
    """
    for client in find_clients(old):
        end_client(client)
    running = {tuple(client.words) for client in find_clients(new)}
    started = [client.on(old, new) for client in clients]
    for client in started:
        if tuple(client.words) not in running:
            start_client(client)


def keep(settle: Callable[[], object]) -> None:
    """Put back what those who begin to look after a device empty first.

    Raises: what ``settle`` raises in the end.
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(DrivebayError):  # they are at the same addresses right now
            settle()
        time.sleep(0.05)
    settle()


def end_client(client: Client) -> None:
    """End it so that it keeps its lease: SIGTERM is that to all, unless it was told otherwise."""
    # `udhcpc -R` gives the lease back when it ends of itself.
    gives_back = client.kind == "udhcpc" and any(
        re.fullmatch(r"-[a-zA-Z]*R[a-zA-Z]*|--release", word) for word in client.words[1:]
    )
    ticks = start_ticks(client.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(client.pid, signal.SIGKILL if gives_back else signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while ticks is not None and start_ticks(client.pid) == ticks:
        if time.monotonic() > deadline:
            raise StateError(
                f"the DHCP client {client.kind} (process {client.pid}) does not end",
                hint=f"kill -9 {client.pid}",
            )
        time.sleep(0.02)


def start_client(client: Client) -> None:
    """Start it apart from us: neither our end nor a lost terminal ends it."""
    process = subprocess.Popen(
        client.words,
        executable=client.program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    process.returncode = 0  # it outlives us
