"""The user's terminal on a guest's serial console, until the escape key or the guest's end.

Context: a command in the foreground of a terminal. The terminal is put back as it was,
however this ends. What the guest prints is kept by QEMU, whether or not anybody looks on.

A guest that does not use its serial port prints nothing. So if the Enter that this begins with
brings no answer, the settings that a guest needs are shown, once; the session goes on.
"""

from __future__ import annotations

import contextlib
import enum
import errno as errno_codes
import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from drivebay.errors import HostError, StateError

__all__ = ["ESCAPE_NAME", "End", "attach"]

ESCAPE: Final = b"\x1d"
ESCAPE_NAME: Final = "Ctrl-]"
CHUNK_BYTES: Final = 4096
# More than anybody pastes; a guest that reads nothing must not keep the escape key from us.
UNSENT_MOST: Final = 1 << 20
SILENCE_SECONDS: Final = 3.0
SILENCE_TEXT: Final = f"""\
[the guest has said nothing since Enter was sent. It may be at work still; another terminal may
 have the console; or the guest does not use its serial port, which it is told like this:
   a login:   sudo systemctl enable --now serial-getty@ttyS0.service
   messages:  the kernel's parameters need console=tty0 console=ttyS0,115200
     Debian, Ubuntu: GRUB_CMDLINE_LINUX in /etc/default/grub, then sudo update-grub
     Fedora, AlmaLinux, openEuler: sudo grubby --update-kernel=ALL --args="console=ttyS0,115200"
 {ESCAPE_NAME} leaves]"""
# What a guest's programs may have switched on in the user's terminal, switched off: colours,
# the second screen, a hidden cursor, cursor and number keys of their own, mouse, marked pastes.
RESET_SCREEN: Final = b"\x1b[0m\x1b[?1047l\x1b[?25h\x1b[?1l\x1b>" + b"".join(
    b"\x1b[?%dl" % mode for mode in (1000, 1002, 1003, 1006, 2004)
)


class End(enum.Enum):
    """Why the session is over."""

    LEFT = "left"  # by the user
    GUEST_ENDED = "the guest has ended"


def attach(path: Path, *, wake: bool = True) -> End:
    """Relay between the terminal and the console's socket; return when either is done.

    ``wake`` sends Enter first, to which a shell says its prompt again, and an installer goes on.

    Raises: StateError without a terminal; HostError when there is no such socket.
    """
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    if not (os.isatty(keyboard) and os.isatty(screen)):
        raise StateError(
            "a console needs a terminal, and there is none", hint="drivebay vm log NAME --follow"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        try:
            console.connect(str(path))
            console.sendall(b"\r" if wake else b"")
        except OSError as error:
            code = error.errno or errno_codes.EIO
            raise HostError("can't reach the guest's console", code, path=str(path)) from error
        console.setblocking(False)
        with _raw(keyboard, screen):
            return _Session(keyboard, screen, console).relay(wake)


@contextlib.contextmanager
def _raw(keyboard: int, screen: int) -> Iterator[None]:
    """The terminal hands on each key; afterwards it is as it was, also after a signal."""
    before = termios.tcgetattr(keyboard)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(keyboard)
        yield
    finally:
        with contextlib.suppress(OSError):  # a terminal whose window was closed
            os.write(screen, RESET_SCREEN)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


class _Session:
    """What one session has sent, and whether the guest has answered yet."""

    def __init__(self, keyboard: int, screen: int, console: socket.socket) -> None:
        self._keyboard = keyboard
        self._screen = screen
        self._console = console
        self._unsent = bytearray()

    def relay(self, awaits_answer: bool) -> End:
        silent_at = time.monotonic() + SILENCE_SECONDS if awaits_answer else None
        while True:
            left = None if silent_at is None else max(0.0, silent_at - time.monotonic())
            writers = [self._console] if self._unsent else []
            readers: list[int | socket.socket] = [self._keyboard, self._console]
            ready, writable, _ = select.select(readers, writers, [], left)
            if self._console in ready:
                if not self._show():
                    return End.GUEST_ENDED
                silent_at = None
            if self._keyboard in ready and not self._take_keys():
                return End.LEFT
            if writable:
                self._send()
            if silent_at is not None and time.monotonic() >= silent_at:
                self._write(SILENCE_TEXT.replace("\n", "\r\n").encode() + b"\r\n")
                silent_at = None

    def _show(self) -> bool:
        """Print what the guest says; False when it has ended."""
        try:
            data = self._console.recv(CHUNK_BYTES)
        except ConnectionError:
            return False
        self._write(data)
        return bool(data)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._screen, data) :]

    def _take_keys(self) -> bool:
        """Take what was typed, up to the escape key; False after that."""
        typed = os.read(self._keyboard, CHUNK_BYTES)
        before, escape, _ = typed.partition(ESCAPE)
        if len(self._unsent) + len(before) <= UNSENT_MOST:
            self._unsent += before
        if escape or not typed:
            self._send()
            return False
        return True

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            del self._unsent[: self._console.send(self._unsent)]
