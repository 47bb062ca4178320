"""A running VM's screen: a connection to it, and a picture of it.

Context: a short-lived process, or a thread of a server. QEMU serves VNC at no address: who may
connect to the VM's monitor hands it one end of a pair of sockets, and speaks RFB on the other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.disks.places import give_name
from drivebay.errors import AlreadyExists, HostError, PeerError, StateError, UsageError
from drivebay.vm.qmp import Qmp, QmpRefused
from drivebay.vm.run import monitor, running
from drivebay.vm.store import Vm

__all__ = ["connect", "take_picture"]

_NAME: Final = "drivebay-screen"  # by which QEMU keeps a descriptor until it is used
_SUFFIX: Final = ".png"

# PNG (ISO/IEC 15948): the signature, then IHDR with width and height; IEND is the last chunk.
_BEGINNING: Final = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_END: Final = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def connect(vm: Vm) -> socket.socket:
    """Return a connection on which the VM's QEMU speaks RFB, and asks for no password.

    Raises: StateError when it does not run or has no screen, HostError, PeerError.
    """
    _check_running(vm)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with theirs, monitor(vm) as qmp, _screen_or_refusal(vm):
            qmp.hand_over(theirs.fileno(), "getfd", fdname=_NAME)
            qmp.call("add_client", protocol="vnc", fdname=_NAME, skipauth=True)
    except BaseException:
        ours.close()
        raise
    return ours


def take_picture(vm: Vm, path: Path, *, replace: bool = False) -> tuple[int, int]:
    """Write the screen as a PNG; ``path`` is there as a whole or not at all.

    Returns: width and height. Raises: AlreadyExists unless it may ``replace`` a file; UsageError
    for another kind of file; StateError, HostError, PeerError.
    """
    if path.suffix.lower() != _SUFFIX:
        raise UsageError(f"the picture is a PNG, and '{path}' does not end in {_SUFFIX}")
    if not replace and os.path.lexists(path):
        raise _taken(path)
    if path.is_dir():
        raise HostError(f"can't write '{path}'", errno.EISDIR, path=str(path))
    _check_running(vm)
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", dir=path.parent, delete=False
        ) as file:
            fresh = Path(file.name)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with monitor(vm) as qmp, _screen_or_refusal(vm):
            _have_it_drawn(qmp, fresh)
        size = _size_of(fresh)
        try:
            if replace:
                fresh.replace(path)
            else:
                give_name(fresh, path)
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            raise _cannot_write(path, error) from error
    finally:
        fresh.unlink(missing_ok=True)
    return size


def _check_running(vm: Vm) -> None:
    if running(vm) is None:
        raise StateError(f"VM '{vm.name}' is not running", hint=f"drivebay vm start {vm.name}")


@contextlib.contextmanager
def _screen_or_refusal(vm: Vm) -> Iterator[None]:
    try:
        yield
    except QmpRefused as error:
        raise StateError(
            f"VM '{vm.name}' shows no screen: {error}",
            hint=f"one that was started by an older drivebay: drivebay vm restart {vm.name}",
        ) from error


def _have_it_drawn(qmp: Qmp, path: Path) -> None:
    """QEMU may open nothing of ours: it gets the file open, for writing alone as it wants it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        answer = qmp.hand_over(descriptor, "add-fd")
    finally:
        os.close(descriptor)
    try:
        number = int(answer["fdset-id"])
    except (TypeError, KeyError, ValueError) as error:
        raise PeerError(f"QEMU gave a file no number, but {answer!r:.80}") from error
    try:
        qmp.call("screendump", filename=f"/dev/fdset/{number}", format="png")
    finally:
        with contextlib.suppress(QmpRefused):
            qmp.call("remove-fd", fdset_id=number)


def _size_of(path: Path) -> tuple[int, int]:
    """Width and height of a whole PNG. Raises: PeerError for anything else."""
    with path.open("rb") as file:
        head = file.read(len(_BEGINNING) + 8)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_END), 0))
        end = file.read()
    if not head.startswith(_BEGINNING) or end != _END:
        raise PeerError("QEMU wrote no whole picture", hint="is the disk full? df -h .")
    width, height = struct.unpack(">II", head[len(_BEGINNING) :])
    return width, height


def _taken(path: Path) -> AlreadyExists:
    return AlreadyExists(f"'{path}' is there already", hint="another name, or --force")


def _cannot_write(path: Path, error: OSError) -> HostError:
    return HostError(f"can't write '{path}'", error.errno or errno.EIO, path=str(path))
