"""A bdev that fails on demand: see error.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t, iovec
from drivebay.bdev.filter cimport FilterBdev
from drivebay.reactor.io cimport BLOCK_IOVECS, io_list_t
from drivebay.reactor.timer cimport timer_t

cdef enum:
    ERROR_FAILURE = 0
    ERROR_PENDING = 1
    ERROR_CORRUPT = 2
    ERROR_NOMEM = 3

cdef enum:
    INJECTIONS = 4          # read, write, flush, unmap: the first IO_ operations

# What one operation has to suffer; shared by all reactors, set by control.
cdef struct injection_t:
    uint32_t left           # how many more; 0: none
    uint32_t kind
    uint64_t queue_depth    # only while that many are with the base
    uint64_t corrupt_offset
    uint64_t corrupt_value

# One write whose data is wrong for the base, and only for it.
cdef struct corruption_t:
    corruption_t* next
    error_t* error
    iovec* iov              # the caller's
    uint32_t iov_count
    uint8_t byte            # the wrong one
    iovec parts[BLOCK_IOVECS]

cdef struct error_t:
    channel_t* channel
    channel_t* base
    injection_t* injections
    io_list_t pending       # until control resumes them
    io_list_t starved       # until the retry timer
    io_list_t uncorrupted   # writes that wait for a free corruption_t
    uint32_t held           # in these three
    corruption_t* free
    timer_t retry

cdef class ErrorChannel(Channel):
    cdef error_t error
    cdef corruption_t* corruptions

cdef class ErrorBdev(FilterBdev):
    cdef injection_t injections[INJECTIONS]
