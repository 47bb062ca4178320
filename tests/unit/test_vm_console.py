"""vm/console.py on a real terminal (a pty), with a guest's serial port that we play."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from drivebay.errors import StateError
from drivebay.vm.console import SILENCE_SECONDS, _Session, attach

WAIT = 20.0
NEVER = 10_000.0
PROGRAM = """
import sys
from pathlib import Path
from drivebay.errors import DrivebayError
from drivebay.vm import console
console.SILENCE_SECONDS = float(sys.argv[2])
try:
    print("over:", console.attach(Path(sys.argv[1]), wake="wake" in sys.argv).name)
except DrivebayError as error:
    print("error:", error)
"""


class Port:
    """QEMU's end of the serial port."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._listening.settimeout(WAIT)
        self.connection: socket.socket | None = None

    def accept(self, first: bytes = b"\r") -> socket.socket:
        self.connection, _ = self._listening.accept()
        self.connection.settimeout(WAIT)
        assert self.connection.recv(len(first)) == first
        return self.connection

    def close(self) -> None:
        self._listening.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    port = Port(tmp_path / "c")
    yield port
    port.close()


class Terminal:
    """A user's terminal in which the console runs."""

    def __init__(self, port: Port, silence: float = NEVER, *, wake: bool = True) -> None:
        words = ["-c", PROGRAM, str(port.path), str(silence), *(["wake"] if wake else [])]
        self.child = pexpect.spawn(sys.executable, words, timeout=WAIT)
        self.child.delaybeforesend = None
        self.guest = port.accept(b"\r" if wake else b"")

    def settings(self) -> list[object]:
        found: list[object] = termios.tcgetattr(self.child.child_fd)
        return found

    def heard(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self.guest.recv(count - len(data))
        return data

    def ready(self) -> None:
        """Wait until the terminal is raw, which the first word of the guest shows."""
        self.guest.sendall(b"login: ")
        self.child.expect_exact(b"login: ")

    def close(self) -> None:
        self.child.close(force=True)


@pytest.fixture
def terminal(port: Port) -> Iterator[Terminal]:
    terminal = Terminal(port)
    yield terminal
    terminal.close()


def test_keys_go_to_the_guest_as_they_are_and_words_come_back(terminal: Terminal) -> None:
    terminal.ready()
    terminal.child.send(b"root\x03\x1a\x04\r")
    assert terminal.heard(8) == b"root\x03\x1a\x04\r"
    terminal.guest.sendall("grüß\x1b[31m dich\r\n".encode())
    terminal.child.expect_exact("grüß\x1b[31m dich\r\n".encode())


def test_the_escape_key_leaves_and_the_terminal_is_as_before(port: Port) -> None:
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    program = [sys.executable, "-c", PROGRAM, str(port.path), str(NEVER), "wake"]
    process = subprocess.Popen(program, stdin=theirs, stdout=theirs)
    guest = port.accept()
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 1000)

    try:
        guest.sendall(b"login: ")
        wait_for(b"login: ")
        assert termios.tcgetattr(theirs) != before
        os.write(ours, b"bye\r\x1dignored")
        wait_for(b"over: LEFT")
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait()
    assert guest.recv(100) == b"bye\r"
    assert guest.recv(100) == b""
    assert termios.tcgetattr(theirs) == before
    assert b"\x1b[?25h" in shown  # what the guest's programs hide is visible again
    assert b"\x1b[?1047l" in shown
    os.close(ours)
    os.close(theirs)


def test_the_end_of_qemu_is_the_end(terminal: Terminal) -> None:
    terminal.ready()
    terminal.guest.close()
    terminal.child.expect_exact(b"over: GUEST_ENDED")


def test_a_signal_leaves_the_terminal_as_before(terminal: Terminal) -> None:
    terminal.ready()
    raw = terminal.settings()
    terminal.child.kill(signal.SIGTERM)
    terminal.child.expect(pexpect.EOF)
    terminal.child.wait()
    assert terminal.child.exitstatus == 128 + signal.SIGTERM
    assert terminal.settings() != raw
    assert terminal.settings()[3] & termios.ECHO  # type: ignore[operator]


def test_a_silent_port_names_the_guests_setting_and_goes_on(port: Port) -> None:
    terminal = Terminal(port, silence=0.01)
    try:
        terminal.child.expect_exact(b"serial-getty@ttyS0.service")
        terminal.child.expect_exact(b"console=ttyS0")
        terminal.child.expect_exact(b"leaves]\r\n")
        terminal.child.send(b"x")
        assert terminal.heard(1) == b"x"
        terminal.guest.sendall(b"there")
        terminal.child.expect_exact(b"there")
        terminal.child.send(b"\x1d")
        terminal.child.expect_exact(b"over: LEFT")
        assert b"serial-getty" not in terminal.child.before
    finally:
        terminal.close()


def test_one_that_is_not_woken_gets_no_key(port: Port) -> None:
    """Enter would answer an installer's first question."""
    terminal = Terminal(port, wake=False)
    try:
        terminal.ready()
        terminal.child.send(b"x\x1d")
        assert terminal.heard(1) == b"x"
        terminal.child.expect_exact(b"over: LEFT")
    finally:
        terminal.close()


def test_one_that_was_asked_nothing_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=SILENCE_SECONDS)
    monkeypatch.setattr("drivebay.vm.console.time.monotonic", lambda: next(clock))
    keyboard, fingers = os.pipe()
    eyes, screen = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = threading.Thread(target=_Session(keyboard, screen, ours).relay, args=(False,))
        session.start()
        os.write(fingers, b"x")
        assert theirs.recv(1) == b"x"
        os.write(fingers, b"\x1d")
        session.join(WAIT)
    os.close(screen)
    assert os.read(eyes, 1000) == b""
    for descriptor in (keyboard, fingers, eyes):
        os.close(descriptor)


def test_a_guest_that_answers_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes half of the time that a guest may be silent."""
    clock = itertools.count(step=SILENCE_SECONDS / 2)
    monkeypatch.setattr("drivebay.vm.console.time.monotonic", lambda: next(clock))
    keyboard, fingers = os.pipe()
    eyes, screen = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"login: ")
        session = threading.Thread(target=_Session(keyboard, screen, ours).relay, args=(True,))
        session.start()
        assert os.read(eyes, 100) == b"login: "
        theirs.sendall(b"again")
        assert os.read(eyes, 100) == b"again"
        os.write(fingers, b"\x1d")
        session.join(WAIT)
    os.close(screen)
    assert os.read(eyes, 100) == b""
    for descriptor in (keyboard, fingers, eyes):
        os.close(descriptor)


def test_a_guest_that_reads_nothing_can_be_left(terminal: Terminal) -> None:
    terminal.ready()
    for _ in range(300):
        terminal.child.send(b"x" * 4000)
    terminal.child.send(b"\x1d")
    terminal.child.expect_exact(b"over: LEFT")


def test_without_a_terminal_there_is_no_console(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull) as nothing:  # noqa: PTH123 - a descriptor for sys.stdin
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr(sys, "stdout", nothing)
        with pytest.raises(StateError, match="needs a terminal"):
            attach(port.path)


def test_a_console_that_is_not_there_is_named(tmp_path: Path) -> None:
    child = pexpect.spawn(
        sys.executable, ["-c", PROGRAM, str(tmp_path / "no"), "1", "wake"], timeout=WAIT
    )
    child.expect_exact(b"error: can't reach the guest's console: No such file or directory")
    child.close(force=True)
