"""Whether a file's device can be polled: asked of the kernel, then tried.

Context: worker threads. Linux before 6.13 completes a polled request of a device without
poll queues by interrupt, as if it had them; hence the question. Later ones refuse it, and
so do file systems that know no polling; hence the trial.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)

from drivebay.engines.uring cimport UringEngine
from drivebay.engines.uring_kernel cimport (
    IORING_REGISTER_ENABLE_RINGS, SYS_io_uring_register, syscall)
from drivebay.engines.uring_path cimport URING_POLLED, uring_start
from drivebay.reactor.io cimport IO_READ, io_t, iovec

import os
import stat
import time
from pathlib import Path

from drivebay.errors import HostError

TRIAL_S = 2.0
DEVICES = Path("/sys/dev/block")


def device_has_poll_queues(fd, devices=DEVICES):
    info = os.fstat(fd)
    number = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
    base = (devices / f"{os.major(number)}:{os.minor(number)}").resolve()
    for queue in (base / "queue", base.parent / "queue"):      # a partition has its disk's
        try:
            return int((queue / "io_poll").read_text()) == 1
        except (OSError, ValueError):
            continue
    return False


cdef bint try_read(UringEngine polled, int fd, void* memory, size_t length) except -1:
    """A read on a ring of this thread's own; one that is not over in time is left to it."""
    cdef iovec part
    cdef io_t io
    memset(&io, 0, sizeof(io))
    part.iov_base = memory
    part.iov_len = length
    io.iov = &part
    io.iov_count = 1
    io.length = length
    io.operation = IO_READ
    if syscall(SYS_io_uring_register, polled.raw.ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0) != 0:
        return False
    uring_start(&polled.raw, &io, <uint64_t>fd | URING_POLLED)
    deadline = time.monotonic() + TRIAL_S
    while polled.raw.engine.inflight:
        with nogil:
            polled.raw.engine.flush(&polled.raw.engine, NULL)
            polled.raw.engine.poll(&polled.raw.engine, NULL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0)
    return io.status == 0 and io.engine & URING_POLLED != 0


def can_be_polled(fd, length):
    cdef void* memory
    cdef size_t size = length
    if not device_has_poll_queues(fd):
        return False
    try:
        plain = UringEngine()
        polled = UringEngine(plain)
    except HostError:
        return False        # whoever opens a channel is told why
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        return False
    try:
        return try_read(polled, fd, memory, size)
    finally:
        munmap(memory, size)
        polled.close()
        plain.close()
