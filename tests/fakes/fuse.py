"""A file system with one file whose answers a test decides: errors, delays, short transfers.

The kernel's FUSE protocol by hand (linux/fuse.h), so that what is tested meets a real file
of a real kernel. Every transfer reaches us, none stays in the page cache. Needs root.
Context: tests; the answers are given in a thread of ours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_LIBC = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 14, 15, 16
_STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT = 17, 18, 20, 25, 26
_INTERRUPT, _BATCH_FORGET, _FALLOCATE = 36, 42, 43
_UNANSWERED = (_FORGET, _INTERRUPT, _BATCH_FORGET)

_IN = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extra, padding
_OUT = struct.Struct("=IiQ")  # len, -errno, unique
_TRANSFER = struct.Struct("=QQI")  # fh, offset, size: the beginning of read and write
_RANGE = struct.Struct("=QQQI")  # fh, offset, length, mode
_WRITE_IN_BYTES = 40
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_MAJOR, _MINOR = 7, 31
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_MAX_WRITE = 1 << 20
_FOPEN_DIRECT_IO = 1
_FOREVER_S = 1 << 30
_ROOT, _FILE = 1, 2

# How many bytes of (operation, offset, length) are done, or minus an errno.
Judge = Callable[[str, int, int], int]


class FuseFile:
    """The file ``path``. ``judge`` decides on each transfer; while ``hold()``, none is answered."""

    def __init__(self, folder: Path, data: bytes, judge: Judge | None = None) -> None:
        self.data = bytearray(data)
        self.judge: Judge = judge or (lambda _operation, _offset, length: length)
        self.seen: list[tuple[str, int, int]] = []
        self._held: list[tuple[int, int, bytes]] | None = None
        self._lock = threading.Lock()
        self._folder = folder
        self.path = folder / "disk.img"
        folder.mkdir(exist_ok=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0"
        if _LIBC.mount(b"fake", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
            os.close(self._device)
            raise OSError(ctypes.get_errno(), "cannot mount a FUSE file system")
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def hold(self) -> None:
        """Answer no transfer and no flush from now on."""
        with self._lock:
            self._held = []

    @property
    def held(self) -> int:
        """How many wait for release()."""
        with self._lock:
            return len(self._held or ())

    def release(self) -> None:
        """Answer what was held back, and everything later at once."""
        with self._lock:
            held, self._held = self._held or [], None
        for opcode, unique, body in held:
            self._answer_transfer(opcode, unique, body)

    def close(self) -> None:
        """What is still held back ends with an error."""
        os.close(self._stopped)
        self._thread.join()
        _LIBC.umount2(os.fsencode(self._folder), _MNT_DETACH)
        os.close(self._device)
        os.close(self._stop)

    # The kernel's requests

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._device, self._stop], [], [])
            if self._stop in ready:
                return
            try:
                message = os.read(self._device, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # unmounted
            _length, opcode, unique, node, *_ = _IN.unpack_from(message)
            self._take(opcode, unique, node, message[_IN.size :])

    def _take(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        if opcode in _UNANSWERED:
            return
        if opcode in (_READ, _WRITE, _FSYNC, _FALLOCATE):
            with self._lock:
                if self._held is not None:
                    self._held.append((opcode, unique, body))
                    return
            self._answer_transfer(opcode, unique, body)
        elif opcode == _INIT:
            flags = struct.unpack_from("=IIII", body)[3] & (_BIG_WRITES | _MAX_PAGES)
            limits = (_MAX_WRITE, 1, _MAX_WRITE // 4096, 0, 0)
            self._reply(unique, _INIT_OUT.pack(_MAJOR, _MINOR, 0, flags, 0, 0, *limits))
        elif opcode == _LOOKUP and body.rstrip(b"\0") == self.path.name.encode():
            head = struct.pack("=QQQQII", _FILE, 0, _FOREVER_S, _FOREVER_S, 0, 0)
            self._reply(unique, head + self._attributes(_FILE))
        elif opcode == _GETATTR:
            self._reply(unique, struct.pack("=QII", _FOREVER_S, 0, 0) + self._attributes(node))
        elif opcode == _OPEN:
            self._reply(unique, struct.pack("=QIi", 0, _FOPEN_DIRECT_IO, 0))
        elif opcode == _STATFS:
            self._reply(unique, bytes(40) + struct.pack("=III28x", 4096, 255, 4096))
        elif opcode in (_RELEASE, _FLUSH):
            self._reply(unique)
        else:
            self._refuse(unique, errno.ENOENT if opcode == _LOOKUP else errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o100600, len(self.data)) if node == _FILE else (0o40700, 0)
        owner = (1, 0, 0, 0)  # links, uid, gid, rdev
        return struct.pack("=6Q10I", node, size, -(-size // 512), *(0,) * 6, mode, *owner, 4096, 0)

    def _answer_transfer(self, opcode: int, unique: int, body: bytes) -> None:
        if opcode == _FSYNC:
            operation, offset, length = "flush", 0, 0
        elif opcode == _FALLOCATE:
            _, offset, length, _mode = _RANGE.unpack_from(body)
            operation = "range"
        else:
            _, offset, length = _TRANSFER.unpack_from(body)
            operation = "read" if opcode == _READ else "write"
        self.seen.append((operation, offset, length))
        moved = self.judge(operation, offset, length)
        if moved < 0:
            self._refuse(unique, -moved)
        elif opcode == _READ:
            self._reply(unique, bytes(self.data[offset : offset + moved]))
        elif opcode == _WRITE:
            self.data[offset : offset + moved] = body[_WRITE_IN_BYTES:][:moved]
            self._reply(unique, struct.pack("=II", moved, 0))
        else:
            if operation == "range" and offset < len(self.data):
                self.data[offset : offset + length] = bytes(length)
            self._reply(unique)

    def _reply(self, unique: int, body: bytes = b"") -> None:
        os.write(self._device, _OUT.pack(_OUT.size + len(body), 0, unique) + body)

    def _refuse(self, unique: int, code: int) -> None:
        os.write(self._device, _OUT.pack(_OUT.size, -code, unique))
