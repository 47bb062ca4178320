"""Open a file or block device so that nobody else writes it, or say who does.

Context: a worker thread. The lock is taken on the very open description that
will do the I/O, so it lasts as long as any request on it is in flight, even
after the process was killed. QEMU's own image locks conflict with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, InUse, UsageError

__all__ = ["device_holders", "file_size", "open_guarded", "release_guard"]

# struct flock: l_type, l_whence, padding, l_start, l_len (0: to the end), l_pid, padding
_FLOCK = struct.Struct("=hhIqqiI")
DYING_S: Final = 1.0  # seen: 50 ms
LOOK_S: Final = 0.01


def open_guarded(path: str, *, readonly: bool, direct: bool) -> int:
    """Open ``path`` and lock it. Raises: HostError, InUse, UsageError."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if "\0" in path or not _is_encodable(path):
        raise UsageError(f"{path!r} is no name of a file", field="filename")
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISBLK(mode):
            flags |= os.O_EXCL
        elif not stat.S_ISREG(mode):
            raise UsageError(f"'{path}' is neither a file nor a block device", field="filename")
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    except OSError as error:
        raise _refusal(path, error) from error
    try:
        # It kept the open of a named pipe from waiting. Left on, a file system that cannot
        # try without waiting would answer each request with EAGAIN, for ever.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        _lock(fd, path, readonly)
    except BaseException:
        os.close(fd)
        raise
    return fd


def release_guard(fd: int) -> None:
    """Give the lock back, even if somebody else still holds the open description for a while."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0, 0, 0))


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _refusal(path: str, error: OSError) -> Exception:
    if error.errno == errno.EBUSY:
        holders = device_holders(path)
        by = "; ".join(holders) if holders else "another program has it open exclusively"
        return InUse(f"block device '{path}' is in use: {by}")
    code = error.errno or errno.EIO
    hint = None
    if code in (errno.EACCES, errno.EPERM):
        hint = f"ls -l {path}"
    return HostError(f"cannot open '{path}'", code, path=path, hint=hint)


def _lock(fd: int, path: str, readonly: bool) -> None:
    """Wait for one who was killed: its last requests hold the lock until the kernel ends them."""
    deadline = time.monotonic() + DYING_S
    while not _try_lock(fd, path, readonly):
        users = _open_by(fd)
        if users or time.monotonic() > deadline:
            who = ", ".join(users) if users else "another process"
            raise InUse(
                f"'{path}' is locked by {who}",
                hint="one writer at a time: stop the other one, or open both read-only",
            )
        time.sleep(LOOK_S)


def _try_lock(fd: int, path: str, readonly: bool) -> bool:
    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise HostError(f"cannot lock '{path}'", error.errno or errno.EIO, path=path) from error
    return True


def _open_by(fd: int) -> list[str]:
    """Processes that have the same file open, as far as we may see; ours only if twice."""
    wanted = os.fstat(fd)
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            same = [
                link
                for link in (process / "fd").iterdir()
                if (info := link.stat()).st_ino == wanted.st_ino and info.st_dev == wanted.st_dev
            ]
            name = (process / "comm").read_text().strip()
        except OSError:
            continue
        if len(same) > (1 if int(process.name) == os.getpid() else 0):
            found.append(f"{name} (pid {process.name})")
    return found


def device_holders(path: str, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[str]:
    """What holds a block device or one of its partitions: mounts, swap, LVM, md."""
    device = Path(path).stat().st_rdev
    base = sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    numbers = {f"{os.major(device)}:{os.minor(device)}"}
    numbers |= {part.read_text().strip() for part in base.glob("*/dev")}
    found = []
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] in numbers:
            found.append(f"mounted on {fields[4]}")
    for line in (proc / "swaps").read_text().splitlines()[1:]:
        swap = Path(line.split()[0])
        if swap.exists():
            rdev = swap.stat().st_rdev
            if f"{os.major(rdev)}:{os.minor(rdev)}" in numbers:
                found.append(f"used as swap ({swap})")
    for holder in sorted([*base.glob("holders/*"), *base.glob("*/holders/*")]):
        kind = "md RAID" if holder.name.startswith("md") else "device mapper (LVM or multipath)"
        found.append(f"held by {kind} {holder.name}")
    return found


def file_size(fd: int) -> int:
    """Bytes of a file or block device."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    return info.st_size
