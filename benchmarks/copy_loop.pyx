# cython: boundscheck=False, wraparound=False
"""The limit of a disk in memory: a loop that copies blocks of 4 KiB and does nothing else.

Context: a thread of the benchmark, pinned to the targets' core. Compiled when the benchmark
runs, and part of nothing that is installed.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef enum:
    BLOCK = 4096
    COPIES_PER_CLOCK = 256  # between two looks at the clock


cdef double now() noexcept nogil:
    cdef timespec moment
    clock_gettime(CLOCK_MONOTONIC, &moment)
    return moment.tv_sec + moment.tv_nsec * 1e-9


def copy_loop(uint8_t[::1] disk, uint8_t[::1] guest, int buffers, bint write, double seconds):
    """Copies a second; ``buffers`` blocks of the guest's memory take turns."""
    cdef uint64_t blocks = disk.shape[0] // BLOCK, random = 88172645463325252, done = 0
    cdef uint8_t* there
    cdef uint8_t* here
    cdef double began, ended
    cdef int i
    if buffers < 1 or buffers * BLOCK > guest.shape[0] or blocks < 1:
        raise ValueError(f"{buffers} buffers do not fit into {guest.shape[0]} bytes")
    with nogil:
        began = ended = now()
        while ended - began < seconds:
            for i in range(COPIES_PER_CLOCK):
                random ^= random << 13
                random ^= random >> 7
                random ^= random << 17
                there = &disk[0] + (random % blocks) * BLOCK
                here = &guest[0] + (done % <uint64_t> buffers) * BLOCK
                if write:
                    memcpy(there, here, BLOCK)
                else:
                    memcpy(here, there, BLOCK)
                done += 1
            ended = now()
    return done / (ended - began)
