"""A controller's listening socket: made with care, and removed only if it is still ours.

Context: control. Anybody who may connect may drive the disk, so the mode is
set before the socket appears in the file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, InUse, UsageError

__all__ = ["ListeningSocket"]

SOCKET_PATH_LIMIT: Final = 107  # sun_path holds 108 bytes, the last of them zero
BACKLOG: Final = 128


class ListeningSocket:
    """``path``, bound and listening."""

    def __init__(
        self, path: Path, mode: int, group: int | None = None, owner: int | None = None
    ) -> None:
        """``owner``: the user who may connect; None is this process's own.

        Raises: UsageError, InUse, HostError."""
        self.path = path
        length = len(os.fsencode(path))
        if length > SOCKET_PATH_LIMIT:
            raise UsageError(
                f"socket path '{path}' is {length} bytes long (at most {SOCKET_PATH_LIMIT} fit)",
                field="ctrlr",
                hint="choose a shorter name, or a shorter folder with -S",
            )
        _clear_the_way(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._bind(mode, group, owner)
        except OSError as error:
            self.socket.close()
            code = error.errno or errno.EIO
            raise HostError(f"cannot make socket '{path}'", code, path=str(path)) from error

    def _bind(self, mode: int, group: int | None, owner: int | None) -> None:
        os.fchmod(self.socket.fileno(), mode)
        self.socket.bind(os.fspath(self.path))
        self._identity = self._look()
        try:
            if group is not None or owner is not None:
                os.chown(self.path, _or_same(owner), _or_same(group))
            self.path.chmod(mode)  # the umask may have taken bits away
            self.socket.listen(BACKLOG)
        except OSError:
            self.path.unlink()
            raise

    def _look(self) -> tuple[int, int]:
        info = self.path.lstat()
        return info.st_dev, info.st_ino

    def close(self) -> None:
        """Stop listening; unlink the path unless somebody else put something there."""
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self._look() == self._identity:
                self.path.unlink()


def _or_same(number: int | None) -> int:
    """chown(2): -1 leaves it as it is."""
    return -1 if number is None else number


def _clear_the_way(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises: HostError, InUse."""
    try:
        found = path.lstat()
    except OSError:
        return  # nothing is there, or bind() says what is wrong
    if not stat.S_ISSOCK(found.st_mode):
        raise HostError(
            f"cannot make socket '{path}', something else is there", errno.EIO, path=str(path)
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody has it open
        except OSError as error:
            code = error.errno or errno.EIO
            raise HostError(f"cannot look at socket '{path}'", code, path=str(path)) from error
    raise InUse(
        f"socket '{path}' is served by another process",
        hint="stop that process, or choose another folder with -S",
    )
