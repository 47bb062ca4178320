"""The malloc bdev: a disk in memory."""

from libc.stdint cimport uint8_t

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.reactor.io cimport io_list_t
from drivebay.reactor.reactor cimport engine_t
from drivebay.reactor.turn_engine cimport TurnEngine

# What is not done at once on one reactor, of all malloc bdevs.
cdef struct copies_t:
    engine_t engine         # first: the reactor knows only this
    io_list_t short         # copied in this turn
    io_list_t long          # these go on a piece in each turn

# channel.module of a malloc channel
cdef struct malloc_t:
    uint8_t* memory
    copies_t* copies

cdef class MallocBdev(Bdev):
    cdef uint8_t* memory
    cdef uint8_t* mapping
    cdef size_t mapping_bytes
    cdef object instance
    cdef int populate(self) except -1

cdef class MallocChannel(Channel):
    cdef malloc_t disk
    cdef CopyEngine copies

cdef class CopyEngine(TurnEngine):
    cdef copies_t raw
