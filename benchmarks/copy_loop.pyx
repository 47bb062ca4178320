# cython: cdivision=True
"""The limit of a disk in memory: a loop that copies blocks of 4 KiB and does nothing else.

Context: a thread of the benchmark, pinned to the targets' core. Compiled when the benchmark
runs, and part of nothing that is installed.
"""

from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
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


cdef uint64_t copy(
    uint8_t* disk, uint64_t blocks, uint8_t* guest, uint64_t buffers, bint write, double seconds,
    double* took,
) noexcept nogil:
    cdef uint64_t random = 88172645463325252, done = 0
    cdef uint8_t* there
    cdef uint8_t* here
    cdef double began = now()
    cdef int _i
    took[0] = 0
    while took[0] < seconds:
        for _i in range(COPIES_PER_CLOCK):
            random ^= random << 13
            random ^= random >> 7
            random ^= random << 17
            there = disk + (random % blocks) * BLOCK
            here = guest + (done % buffers) * BLOCK
            if write:
                memcpy(there, here, BLOCK)
            else:
                memcpy(here, there, BLOCK)
            done += 1
        took[0] = now() - began
    return done


def copy_loop(disk, guest, int buffers, bint write, double seconds):
    """Copies a second; ``buffers`` blocks of the guest's memory take turns."""
    cdef Py_buffer there, here
    cdef double took
    cdef uint64_t done
    if buffers < 1 or buffers * BLOCK > len(guest) or len(disk) < BLOCK:
        raise ValueError(f"{buffers} buffers do not fit into {len(guest)} bytes")
    # Not typed memoryviews: compiling those takes longer than the whole loop runs.
    PyObject_GetBuffer(disk, &there, PyBUF_WRITABLE)
    PyObject_GetBuffer(guest, &here, PyBUF_WRITABLE)
    with nogil:
        done = copy(
            <uint8_t*> there.buf, there.len // BLOCK, <uint8_t*> here.buf, buffers, write,
            seconds, &took)
    PyBuffer_Release(&here)
    PyBuffer_Release(&there)
    return done / took
