"""Files and devices that a command hands to the target: made, looked at, and seen by both.

Context: a short-lived process. A path means the same to the target only if both live in the
same folders, so that is checked, and a file that the command makes must be the target's to
open. Nothing here writes into a file that was there before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.disks.connection import target_owner
from drivebay.disks.contents import Content, find_contents
from drivebay.errors import AlreadyExists, HostError, StateError, UsageError

__all__ = [
    "check_visible",
    "contents_of",
    "data_folder",
    "default_pool_size",
    "free_bytes",
    "give_name",
    "holds_data",
    "make_sparse_file",
    "opened",
    "place_size",
    "remove_file",
    "resize_file",
]

_KEPT_FREE: Final = 0.2
_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP)  # said by a file system without them: FAT


def data_folder() -> Path:
    """Return where this user's pools lie unless they are told to lie elsewhere."""
    named = os.environ.get("XDG_DATA_HOME")
    if named and Path(named).is_absolute():
        return Path(named) / "drivebay"
    if os.geteuid() == 0:
        return Path("/var/lib/drivebay")
    return Path.home() / ".local" / "share" / "drivebay"


def default_pool_size(folder: Path) -> int:
    """A size for a sparse file that its file system can really fill, in whole GiB if it can."""
    free = free_bytes(folder)
    size = int(free * (1 - _KEPT_FREE))
    unit = _GIB if size >= _GIB else _MIB
    return size // unit * unit


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged user may still write on the file system of ``path``.

    A folder that does not exist yet counts as the next one above it that does.
    """
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def make_sparse_file(path: Path, size: int, socket: str) -> None:
    """Make a file of ``size`` bytes that takes up no space, for the target behind ``socket``.

    Raises: AlreadyExists, HostError; StateError when the target could not open it.
    """
    pid, uid = target_owner(socket)
    own = os.geteuid()
    if uid not in (0, own) and own != 0:
        raise StateError(
            f"the target runs as user {uid} and could not open a file that user {own} makes",
            hint="run the command as the target's user",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"there is a file '{path}' already") from None
    except OSError as error:
        raise _refusal(f"can't make the file '{path}'", error, path) from error
    try:
        os.ftruncate(descriptor, size)
        if own == 0 and uid != 0:
            os.fchown(descriptor, uid, -1)
        check_visible(path, pid)
    except OSError as error:
        path.unlink()
        raise _refusal(f"can't make '{path}' {size} bytes long", error, path) from error
    except StateError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def check_visible(path: Path, pid: int) -> None:
    """Refuse a path that means another file to the target's process. Raises: StateError."""
    own = path.stat()
    try:
        theirs = Path(f"/proc/{pid}/root/{path.absolute()}").stat()
    except PermissionError:
        return  # another user's process: it will say itself what it can't open
    except OSError:
        theirs = None
    if theirs is None or (theirs.st_dev, theirs.st_ino) != (own.st_dev, own.st_ino):
        raise StateError(
            f"process {pid}, the target, sees other folders than this command: there is no "
            f"'{path}' for it",
            hint="use the command where the target runs (in its container)",
        )


def remove_file(path: Path) -> None:
    """Remove a file that a step has made. Raises: HostError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(f"can't remove '{path}'", error, path) from error


def give_name(fresh: Path, path: Path) -> None:
    """Move a finished file to its name, unless somebody has made one of that name meanwhile.

    Raises: FileExistsError, OSError.
    """
    try:
        path.hardlink_to(fresh)  # unlike a renaming, it replaces nothing
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        fresh.rename(path)
    else:
        fresh.unlink()


def resize_file(path: Path, size: int) -> None:
    """Make a file longer or shorter. Raises: HostError."""
    try:
        os.truncate(path, size)
    except OSError as error:
        raise _refusal(f"can't make '{path}' {size} bytes long", error, path) from error


def place_size(path: Path) -> int:
    """Bytes of a file or block device. Raises: HostError; UsageError for anything else."""
    with opened(path) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_END)


def contents_of(path: Path) -> list[Content]:
    """What a file or device is recognized to hold. Raises: HostError, UsageError."""
    with opened(path) as descriptor:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        return find_contents(lambda offset, length: os.pread(descriptor, length, offset), size)


def holds_data(path: Path) -> bool:
    """Whether anything was ever written: to a file anywhere, to a device near its two ends.

    Raises: HostError, UsageError.
    """
    with opened(path) as descriptor:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            try:
                return size > 0 and os.lseek(descriptor, 0, os.SEEK_DATA) < size
            except OSError as error:
                if error.errno == errno.ENXIO:  # one hole up to the end
                    return False
                raise _refusal(f"can't read '{path}'", error, path) from error
        ends = {0, max(0, size - _MIB)}
        return any(any(os.pread(descriptor, _MIB, offset)) for offset in ends)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read a file or device. Raises: HostError, UsageError for anything else."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"'{path}' is neither a file nor a block device")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refusal(f"can't open '{path}'", error, path) from error
    try:
        if stat.S_ISBLK(mode):
            # What was written through a partition's node is not in the disk's own page cache.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield descriptor
    finally:
        os.close(descriptor)


def _refusal(what: str, error: OSError, path: Path) -> HostError:
    code = error.errno or errno.EIO
    hint = f"ls -ld {path.parent} {path}" if code in (errno.EACCES, errno.EPERM) else None
    return HostError(what, code, path=str(path), hint=hint)
