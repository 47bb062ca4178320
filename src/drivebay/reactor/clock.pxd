"""Ticks: the time stamp counter and its rate. Context: any."""

from libc.stdint cimport uint64_t

cdef uint64_t ticks_per_second() noexcept
