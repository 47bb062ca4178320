"""File descriptors that came over a socket: who holds them, and what they may be.

Context: control. A descriptor from a front end is an open file of somebody
else's choosing. Nothing here reads from one or writes to one: only a reactor does that,
which can be freed when the other holder makes it block.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from drivebay.errors import PeerError

__all__ = ["Received", "check_eventfd", "close_all", "take_stream_socket"]

_EVENTFD_LINK: Final = "anon_inode:[eventfd]"


def close_all(fds: Iterable[int]) -> None:
    """Close those that are there; -1 stands for none."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)


class Received:
    """The descriptors of one message, closed with it unless somebody takes them."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, fds: Iterable[int]) -> None:
        self._fds.extend(fds)

    def close_surplus(self, wanted: int) -> int:
        """Close those behind the first ``wanted``; returns how many."""
        surplus = self._fds[wanted:]
        del self._fds[wanted:]
        close_all(surplus)
        return len(surplus)

    def borrow(self) -> tuple[int, ...]:
        """Look at them; close() still closes them."""
        return tuple(self._fds)

    def take(self) -> int:
        """The first one, which is the caller's from now on; -1 if there is none."""
        return self._fds.pop(0) if self._fds else -1

    def close(self) -> None:
        self.close_surplus(0)


def check_eventfd(fd: int, what: str) -> None:
    """Make sure that ``fd`` is an eventfd, and that writing to it cannot block.

    A reactor writes to it: a pipe or a socket could block it, or fill up.
    Raises: PeerError.
    """
    link = str(Path(f"/proc/self/fd/{fd}").readlink())
    if link != _EVENTFD_LINK:
        raise PeerError(f"{what} is '{link}' (must be an eventfd)")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_NONBLOCK:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)


def take_stream_socket(received: Received, what: str) -> socket.socket:
    """Own the message's first descriptor, which must be a Unix stream socket. Raises: PeerError."""
    (fd, *_) = received.borrow()
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise PeerError(f"{what} is not a socket")
    try:
        taken = socket.socket(fileno=fd)
    except OSError as error:
        raise PeerError(f"{what} is a socket of an unusable kind: {error}") from error
    received.take()
    if taken.family != socket.AF_UNIX or taken.type != socket.SOCK_STREAM:
        kind = f"{taken.family!r} {taken.type!r}"  # of some families Python has no name
        taken.close()
        raise PeerError(f"{what} is a socket of kind {kind} (must be a Unix stream socket)")
    taken.setblocking(False)
    return taken
