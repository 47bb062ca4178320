"""How fast the time stamp counter runs, measured once against the monotonic clock."""

from libc.stdint cimport uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from drivebay.memory.platform cimport tsc_read

cdef uint64_t measured = 0


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef uint64_t ticks_per_second() noexcept:
    """Measured over 2 ms at the first call: good to about 1 in 10,000."""
    global measured
    cdef uint64_t ns, ticks, elapsed = 0
    if measured == 0:
        with nogil:
            ns = monotonic_ns()
            ticks = tsc_read()
            while elapsed < 2_000_000:
                elapsed = monotonic_ns() - ns
            ticks = tsc_read() - ticks
        measured = <uint64_t>(<double>ticks * 1e9 / <double>elapsed)
    return measured


def tick_rate():
    return ticks_per_second()
