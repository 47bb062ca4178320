"""Disks in files and on block devices.

O_DIRECT where the file system has it and its alignment is not coarser than the
bdev's blocks; else through the page cache, and driver_specific says so. FLUSH is
fsync, FUA is RWF_DSYNC, UNMAP punches holes. A file in tmpfs is memory: it is read
and written at once, since io_uring would hand every request to another thread. Where the
device has poll queues, reads are polled for, and a block device's writes.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport close

from drivebay.bdev.base cimport (
    BDEV_FUA, BDEV_VOLATILE_CACHE, Bdev, Channel, IO_FLUSH, IO_FUA, IO_READ, IO_UNMAP, IO_WRITE,
    IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_PENDING, channel_t, io_t, iovec,
)
from drivebay.engines.uring cimport polled_uring_of, uring_of, uring_register, uring_unregister
from drivebay.engines.uring_path cimport URING_POLLED, URING_WORKER, uring_start

import errno
import os
import stat
from pathlib import Path

from drivebay.bdev.file_guard import file_size, open_guarded, release_guard
from drivebay.engines.uring_probe import can_be_polled
from drivebay.errors import HostError, UsageError

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <sys/stat.h>
    #include <sys/vfs.h>
    """

cdef extern from "<sys/stat.h>" nogil:
    cdef struct c_statx "statx":
        uint32_t stx_mask
        uint32_t stx_dio_mem_align
        uint32_t stx_dio_offset_align
    int AT_EMPTY_PATH
    unsigned int STATX_DIOALIGN
    int c_statx_call "statx"(int fd, const char* path, int flags, unsigned int mask, c_statx* out)

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
    int c_fallocate "fallocate"(int fd, int mode, long offset, long length)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec* parts, int count, long offset)
    ssize_t pwritev(int fd, const iovec* parts, int count, long offset)

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct c_statfs "statfs":
        long f_type
    int fstatfs(int fd, c_statfs* out)

cdef enum:
    TMPFS_MAGIC = 0x01021994
    FUSE_MAGIC = 0x65735546
    PAGE_BYTES = 4096
    IOVECS_A_CALL = 1024        # IOV_MAX of the kernel
    COPY_BYTES = 1048576        # what a file in memory moves at once: others wait meanwhile


cdef void file_enter(channel_t* channel) noexcept nogil:
    cdef file_t* file = <file_t*>channel.module
    file.handle = uring_register(file.uring, file.fd)


cdef void file_leave(channel_t* channel) noexcept nogil:
    """Before the descriptor is closed: the ring's table would keep file and lock."""
    cdef file_t* file = <file_t*>channel.module
    uring_unregister(file.uring, file.handle)
    file.handle = <uint64_t>file.fd


cdef int file_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef file_t* file = <file_t*>channel.module
    uring_start(file.uring, io, file.handle)
    return SUBMIT_PENDING


cdef int polled_file_submit(channel_t* channel, io_t* io) noexcept nogil:
    """Reads only. A file system may have to wait within a write (in a hole, or where the cache
    is not written back), and Linux 6.1 then waits for an interrupt that never comes.
    """
    cdef file_t* file = <file_t*>channel.module
    if io.operation != IO_READ:
        return file_submit(channel, io)
    uring_start(file.polled, io, <uint64_t>file.fd | URING_POLLED)
    return SUBMIT_PENDING


cdef int polled_device_submit(channel_t* channel, io_t* io) noexcept nogil:
    """Reads, and writes that need no flush behind them: that would wait for the device anyway."""
    cdef file_t* file = <file_t*>channel.module
    if io.operation != IO_WRITE or io.flags & IO_FUA:
        return polled_file_submit(channel, io)
    uring_start(file.polled, io, <uint64_t>file.fd | URING_POLLED)
    return SUBMIT_PENDING


cdef int memory_file_submit(channel_t* channel, io_t* io) noexcept nogil:
    """Whatever is long or not done whole at once goes the long way, which knows short and full."""
    cdef file_t* file = <file_t*>channel.module
    cdef ssize_t moved = -1
    if io.length > COPY_BYTES:
        return file_submit(channel, io)
    if io.operation == IO_READ:
        moved = preadv(file.fd, io.iov, min(io.iov_count, <uint32_t>IOVECS_A_CALL), io.offset)
    elif io.operation == IO_WRITE:
        moved = pwritev(file.fd, io.iov, min(io.iov_count, <uint32_t>IOVECS_A_CALL), io.offset)
    if moved < 0 or <uint64_t>moved != io.length:
        return file_submit(channel, io)
    io.status = 0
    return SUBMIT_DONE


cdef unsigned long file_system(int fd):
    """Its magic number, 0 for a device: fstatfs(2) would see that of /dev, a tmpfs."""
    cdef c_statfs fs
    cdef int status
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return 0
    with nogil:
        status = fstatfs(fd, &fs)
    return fs.f_type if status == 0 else 0


def logical_block_size(fd):
    """Of the device behind a file, or of a block device itself."""
    info = os.fstat(fd)
    number = info.st_rdev if stat.S_ISBLK(info.st_mode) else 0
    base = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (base / "queue", base.parent / "queue"):
        if number and (queue / "logical_block_size").exists():
            return int((queue / "logical_block_size").read_text())
    return 512


cdef tuple direct_alignment(int fd):
    """(memory, offset) alignment that O_DIRECT asks for; (0, 0): it is of no use here."""
    cdef c_statx info
    cdef int status
    if file_system(fd) == TMPFS_MAGIC:
        return 0, 0
    with nogil:     # the file may lie on another machine: nobody else waits for it
        status = c_statx_call(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info)
    if status != 0:
        return 0, 0
    if info.stx_mask & STATX_DIOALIGN:
        return info.stx_dio_mem_align, info.stx_dio_offset_align
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        # Before Linux 6.11 devices do not say; whole blocks suit them all.
        return logical_block_size(fd), logical_block_size(fd)
    return 0, 0


cdef bint can_punch(int fd, uint64_t size):
    """Whether the file takes holes, tried behind its end, where it changes nothing."""
    cdef long end = (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    cdef int status
    with nogil:
        status = c_fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, end, PAGE_BYTES)
    return status == 0


def device_takes_holes(fd):
    """Whether a block device unmaps blocks so that they read as zeroes."""
    number = os.fstat(fd).st_rdev
    base = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (base / "queue", base.parent / "queue"):
        try:
            limits = [int((queue / name).read_text())
                      for name in ("discard_max_bytes", "write_zeroes_max_bytes")]
        except OSError:
            continue
        return all(limits)
    return False


cdef class FileChannel(Channel):
    def __init__(self, FileBdev bdev, reactor):
        Channel.__init__(self, bdev, reactor)
        self.engine = uring_of(self.reactor)
        self.file.uring = &self.engine.raw
        kind = file_system(bdev.fd)
        self.file.fd = bdev.fd
        self.file.handle = <uint64_t>bdev.fd
        if kind == FUSE_MAGIC:
            # The kernel calls its server at once and waits for it: never on a reactor.
            self.file.handle |= URING_WORKER
        elif kind:
            # Not a device: older kernels empty a place up to a second later, and until then
            # nobody else could open it.
            self.raw.enter = file_enter
            self.raw.leave = file_leave
        self.raw.module = &self.file
        self.raw.submit = memory_file_submit if kind == TMPFS_MAGIC else file_submit
        if bdev.polled:
            self.polled_engine = polled_uring_of(self.reactor)
            self.file.polled = &self.polled_engine.raw
            self.raw.submit = polled_file_submit if kind else polled_device_submit


cdef class FileBdev(Bdev):
    def __cinit__(self):
        self.fd = -1

    def __init__(self, str name, uuid, str path, int block_size=0, bint readonly=False,
                 str module="aio", fallocate=None):
        self.path = path
        self.module = module
        self.product_name = "AIO disk" if module == "aio" else "URING bdev"
        self.asked_block_size = block_size != 0
        self.fallocate = fallocate
        self.fd = self.open_file(block_size, readonly)
        memory, offset = direct_alignment(self.fd) if self.direct else (0, 0)
        if not block_size:
            block_size = max(512, offset, logical_block_size(self.fd))
        size = file_size(self.fd)
        if size == 0 or size % block_size:
            raise UsageError(
                f"'{path}' has {size} bytes, which is no multiple of the block size {block_size}",
                field="filename")
        Bdev.__init__(self, name, uuid, block_size, size // block_size)
        if self.direct:
            self.raw.buffer_mask = max(memory, 1) - 1
            self.raw.length_mask = max(memory, offset, 1) - 1
        self.polled = self.direct and can_be_polled(self.fd, max(memory, offset, block_size))
        self.readonly = readonly
        self.raw.flags = BDEV_VOLATILE_CACHE | BDEV_FUA
        self.raw.operations = 1 << IO_READ
        if not readonly:
            self.raw.operations |= self.write_operations(size)

    def open_file(self, block_size, readonly):
        """With O_DIRECT if that serves these blocks, else through the page cache."""
        self.direct = True
        try:
            fd = open_guarded(self.path, readonly=readonly, direct=True)
        except HostError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            return open_guarded(self.path, readonly=readonly, direct=False)
        memory, offset = direct_alignment(fd)
        if memory and (block_size == 0 or offset <= block_size):
            return fd
        os.close(fd)
        self.direct = False
        return open_guarded(self.path, readonly=readonly, direct=False)

    def write_operations(self, size):
        found = 1 << IO_WRITE | 1 << IO_FLUSH
        if self.fallocate is False:
            return found
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            found |= 1 << IO_WRITE_ZEROES
            if device_takes_holes(self.fd):
                found |= 1 << IO_UNMAP
        elif can_punch(self.fd, size):
            found |= 1 << IO_WRITE_ZEROES | 1 << IO_UNMAP
        return found

    def open_channel(self, reactor, *bases):
        return FileChannel(self, reactor)

    @property
    def content_id(self):
        """The file, whatever it is called, and not the uuid, which may be another each time."""
        info = os.fstat(self.fd)
        if stat.S_ISBLK(info.st_mode):
            return f"device {info.st_rdev}"
        return f"file {info.st_dev}:{info.st_ino}"

    def rescan(self):
        """Blocks that the file has now; resize() is the caller's to do."""
        return file_size(self.fd) // self.block_size

    def driver_specific(self):
        return {self.module: {
            "filename": self.path, "block_size_override": self.asked_block_size,
            "readonly": bool(self.readonly), "fallocate": "unmap" in self.io_types,
            "direct": bool(self.direct), "polled": bool(self.polled)}}

    def save(self):
        params = {"name": self.name, "block_size": self.block_size, "filename": self.path}
        if self.module == "aio":
            params["readonly"] = bool(self.readonly)
            params["fallocate"] = self.fallocate is not False
        params["uuid"] = str(self.uuid)
        return f"bdev_{self.module}_create", params

    def close(self):
        if self.fd >= 0:
            release_guard(self.fd)      # an old kernel's ring may keep the file a little longer
            with nogil:
                close(self.fd)
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
