"""A bdev whose reads and writes take longer: see delay.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t
from drivebay.bdev.filter cimport FilterBdev
from drivebay.reactor.io cimport io_list_t
from drivebay.reactor.timer cimport timer_t

# Every hundredth I/O of each direction belongs to the slow class.
cdef enum:
    AVG_READ = 0
    P99_READ = 1
    AVG_WRITE = 2
    P99_WRITE = 3
    DELAYS = 4
    DIRECTIONS = 2

# Which of the next hundred I/Os of one direction is the slow one.
cdef struct lot_t:
    uint32_t position
    uint32_t slow

cdef struct delay_t:
    channel_t* base
    const uint64_t* latencies_us    # the bdev's; control changes them
    io_list_t waiting[DELAYS]       # the deadline of each is in io.engine
    timer_t timer                   # for the earliest of them
    lot_t lots[DIRECTIONS]
    uint64_t random

cdef class DelayChannel(Channel):
    cdef delay_t delay

cdef class DelayBdev(FilterBdev):
    cdef uint64_t latencies_us[DELAYS]
