"""The user's terminal on a guest's serial console, until the escape key or the guest's end.

Context: a command in the foreground of a terminal. The terminal is put back as it was,
however this ends.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from pathlib import Path

__all__ = ["ESCAPE_NAME", "attach"]

ESCAPE = b"\x1d"
ESCAPE_NAME = "Ctrl-]"
CHUNK_BYTES = 4096


def attach(path: Path) -> None:
    """Relay between the terminal and the console's socket; return when either is done."""
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    before = termios.tcgetattr(keyboard)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.connect(str(path))
        console.sendall(b"\r")  # the shell prints its prompt again
        try:
            tty.setraw(keyboard)
            _relay(keyboard, screen, console)
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _relay(keyboard: int, screen: int, console: socket.socket) -> None:
    sources: list[int | socket.socket] = [keyboard, console]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if console in ready:
            data = console.recv(CHUNK_BYTES)
            if not data:
                return
            while data:
                data = data[os.write(screen, data) :]
        if keyboard in ready:
            typed = os.read(keyboard, CHUNK_BYTES)
            if not typed or ESCAPE in typed:
                return
            console.sendall(typed)
