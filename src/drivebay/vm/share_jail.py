"""The program that becomes virtiofsd, in namespaces that give it less than its starter has.

    python share_jail.py rw|ro DIRECTORY COMMAND …

Context: a child process of ``vm.shares`` that imports nothing of Drivebay. Neither virtiofsd
can do these two things for every starter:

- One who is not root has no right to make the namespaces of virtiofsd's sandbox; in a user
  namespace, in which they are its root and nobody else, they have.
- A folder that is ``ro`` is so for the kernel, with all that is mounted below it: virtiofsd
  could not write into it even if a guest had taken it over.

The guest's kernel asks virtiofsd as the user who does something there. In such a user namespace
only its root exists, who is the starter.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Final, NoReturn

# linux/sched.h, linux/mount.h, linux/fcntl.h
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUSER: Final = 0x1000_0000
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x4_0000
MS_SLAVE: Final = 0x8_0000
MOUNT_ATTR_RDONLY: Final = 0x1
AT_FDCWD: Final = -100
AT_RECURSIVE: Final = 0x8000
SYS_MOUNT_SETATTR: Final = 442  # the same on all processors; since Linux 5.12
ATTRIBUTES: Final = struct.Struct("=QQQQ")  # struct mount_attr: set, clear, propagation, userns

_libc = ctypes.CDLL(None, use_errno=True)


def main(words: list[str]) -> NoReturn:
    """Become the command, or end with a sentence."""
    mode, directory, *command = words
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        _try("a user namespace, which its sandbox needs without root", _libc.unshare,
             CLONE_NEWUSER | CLONE_NEWNS)  # fmt: skip
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    elif mode == "ro":
        _try("a mount namespace", _libc.unshare, CLONE_NEWNS)
    if mode == "ro":
        _make_read_only(os.fsencode(directory))
    os.execv(command[0], command)


def _make_read_only(directory: bytes) -> None:
    what = f"'{os.fsdecode(directory)}' read-only"
    _try(what, _libc.mount, b"none", b"/", None, MS_REC | MS_SLAVE, None)
    _try(what, _libc.mount, directory, directory, None, MS_BIND | MS_REC, None)
    # Private: what somebody mounts below it later would come in with the right to write.
    attributes = ATTRIBUTES.pack(MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, 0)
    _try(what, _libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, directory, AT_RECURSIVE, attributes,
         len(attributes))  # fmt: skip


def _try(what: str, call: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if call(*arguments) != 0:
        sys.exit(f"there can't be {what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as failure:
        sys.exit(f"can't start virtiofsd: {failure}")
