"""The malloc bdev: a disk in memory."""

from libc.stdint cimport uint8_t

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.reactor.io cimport io_t
from drivebay.reactor.reactor cimport engine_t

# The long operations on one reactor, of all malloc bdevs: they go on a piece in each turn.
cdef struct pieces_t:
    engine_t engine         # first: the reactor knows only this
    io_t* first
    io_t* last

# channel.module of a malloc channel
cdef struct malloc_t:
    uint8_t* memory
    pieces_t* pieces

cdef class MallocBdev(Bdev):
    cdef uint8_t* memory
    cdef uint8_t* mapping
    cdef size_t mapping_bytes
    cdef object instance
    cdef int populate(self) except -1

cdef class MallocChannel(Channel):
    cdef malloc_t disk
    cdef PiecesEngine pieces

cdef class PiecesEngine:
    cdef pieces_t raw
