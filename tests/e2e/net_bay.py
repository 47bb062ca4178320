"""A host of its own for tests of networks: a network namespace in which the command line runs.

Nothing here touches the network of the machine: what a test makes is in namespaces whose names
begin with ``db-test-``. Whatever runs in them ends with the bay, and they go with it.

    with net_bay_in(folder) as bay:
        bay.link(bay.host, "eno1", bay.namespace("lan"), "eth0")
        bay.ok("net", "create", "lan")
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes.process import wait_until

_NUMBERS = itertools.count()
XDG = ("DATA", "RUNTIME", "STATE", "CACHE", "CONFIG")


class NetBay:
    """Namespaces and the links between them; ``host`` is the one that plays the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = dict(os.environ)
        for kind in XDG:
            path = folder / kind.lower()
            path.mkdir(mode=0o711)
            name = f"XDG_{kind}_DIR" if kind == "RUNTIME" else f"XDG_{kind}_HOME"
            self.environment[name] = str(path)
        self._labels: list[str] = []
        self._programs: list[subprocess.Popen[bytes]] = []
        self.host = self.namespace("host")

    @property
    def networks(self) -> Path:
        """Where root's networks are."""
        return self.folder / "data/drivebay/networks"

    # ---- namespaces -----------------------------------------------------------------------------

    def namespace(self, label: str) -> str:
        """Make a namespace, which has nothing but its loopback."""
        name = f"db-test-{os.getpid()}-{next(_NUMBERS)}-{label}"
        _ip("netns", "add", name)
        self._labels.append(name)
        self.ip(name, "link set lo up")
        return name

    def link(self, one: str, interface: str, other: str, its_interface: str) -> None:
        """A cable between two namespaces: a veth pair, both ends up."""
        self.ip(one, f"link add {interface} type veth peer name {its_interface} netns {other}")
        self.ip(one, f"link set {interface} up")
        self.ip(other, f"link set {its_interface} up")

    def ip(self, namespace: str, words: str) -> str:
        """``ip`` of iproute2 in a namespace."""
        return _ip("-n", namespace, *words.split())

    def links(self, namespace: str) -> list[str]:
        """The names of a namespace's interfaces, sorted."""
        return sorted(link["ifname"] for link in json.loads(self.ip(namespace, "-json link")))

    def run_in(
        self, namespace: str, *command: str, timeout_s: float = 60, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a namespace to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", namespace, *command],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self.environment,
            cwd=self.folder,
        )

    def ok_in(self, namespace: str, *command: str, stdin: str = "") -> str:
        """Run a program that has to succeed; what it wrote."""
        done = self.run_in(namespace, *command, stdin=stdin)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start_in(self, namespace: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program that ends with the bay, or earlier."""
        program = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            cwd=self.folder,
        )
        self._programs.append(program)
        return program

    # ---- the command line -----------------------------------------------------------------------

    def run(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of ours, on the host."""
        return self.run_in(self.host, *drivebay(*words), timeout_s=timeout_s)

    def ok(self, *words: str) -> str:
        return self.ok_in(self.host, *drivebay(*words))

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def refused(self, *words: str, code: int = 1) -> str:
        """A command that has to be refused; what it says."""
        done = self.run(*words)
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done.stderr

    # ---- who talks to whom ----------------------------------------------------------------------

    def answer_tcp(self, namespace: str, address: str, port: int) -> None:
        """Answer each TCP connection with the address that it came from."""
        code = (
            "import socket,sys\n"
            "s=socket.create_server((sys.argv[1],int(sys.argv[2])))\n"
            "while True:\n    c,a=s.accept(); c.sendall(a[0].encode()); c.close()\n"
        )
        self.start_in(namespace, sys.executable, "-c", code, address, str(port))
        wait_until(lambda: bool(self.ok_in(namespace, "ss", "-Hltn", f"sport = :{port}")),
                   f"a server on {address}:{port}")  # fmt: skip

    def seen_as(self, namespace: str, address: str, port: int) -> str | None:
        """As whom a TCP server (`answer_tcp`) sees us; None when we do not reach it."""
        code = (
            "import socket,sys\n"
            "s=socket.create_connection((sys.argv[1],int(sys.argv[2])),2)\n"
            "print(s.recv(99).decode())\n"
        )
        done = self.run_in(namespace, sys.executable, "-c", code, address, str(port))
        return done.stdout.strip() if done.returncode == 0 else None

    # ---- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """Nothing that a test has started or made stays."""
        for name in self._labels:
            _kill_all(name)
            _ip("netns", "delete", name)
        for program in self._programs:
            program.wait(10)
            if program.stdout is not None:
                program.stdout.close()


def drivebay(*words: str) -> list[str]:
    """Our command line, as a program of its own."""
    return [sys.executable, "-m", "drivebay", *words]


@contextlib.contextmanager
def net_bay_in(folder: Path) -> Iterator[NetBay]:
    """A bay that ends with the block."""
    bay = NetBay(folder)
    try:
        yield bay
    finally:
        bay.end()


def _kill_all(namespace: str) -> None:
    """A process may start another while we look, so look again until there is none."""
    until = time.monotonic() + 10
    while (pids := _pids(namespace)) and time.monotonic() < until:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _pids(namespace: str) -> list[int]:
    """The processes of a namespace that have not ended yet."""
    found = [int(pid) for pid in _ip("netns", "pids", namespace).split()]
    return [pid for pid in found if not _is_zombie(pid)]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout
