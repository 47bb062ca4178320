"""The malloc bdev: a disk in memory."""

from libc.stdint cimport uint8_t

from drivebay.bdev.base cimport Bdev, Channel, io_t
from drivebay.reactor.reactor cimport engine_t

# The long operations of one channel: they go on a piece in each turn.
cdef struct malloc_engine_t:
    engine_t engine         # first: the reactor knows only this
    uint8_t* memory
    io_t* first
    io_t* last

cdef class MallocBdev(Bdev):
    cdef uint8_t* memory
    cdef uint8_t* mapping
    cdef size_t mapping_bytes

cdef class MallocChannel(Channel):
    cdef malloc_engine_t engine
