"""A disk in plain Python, run by threads of its own. Context: see the .pyx."""

from libc.stdint cimport uint32_t

from drivebay.bdev.base cimport Bdev, Channel, io_list_t, io_t
from drivebay.reactor.mailbox cimport message_t

cdef enum:
    REQUESTS = 256          # of a channel, with the threads at once; more wait
    PIECE_BYTES = 1048576   # the most data of one call

# One I/O on its way to the threads and back.
cdef struct request_t:
    message_t message       # first: its outcome, to the reactor it came from
    request_t* next
    io_t* io

# Between the reactors and the threads of one bdev.
cdef struct calls_t:
    request_t* posted       # newest first
    uint32_t sleepers       # threads that wait for the doorbell; written with the GIL
    int doorbell            # eventfd; each read takes one ring

# channel.module of a Python channel
cdef struct python_t:
    calls_t* calls
    request_t* free
    io_list_t waiting       # I/O that found none free
    request_t requests[REQUESTS]

cdef class PythonChannel(Channel):
    cdef python_t state

cdef class PythonBdev(Bdev):
    cdef readonly object disk
    cdef calls_t calls
    cdef request_t* oldest  # taken off the reactors' list, not yet served
    cdef bint stopping
    cdef object starting
    cdef list threads
    cdef object faults
    cdef request_t* take(self)
    cdef int wait(self) except -1
    cdef int serve(self, request_t* request) noexcept
    cdef int call(self, io_t* io) except -1
    cdef int read_pieces(self, io_t* io) except -1
    cdef int write_pieces(self, io_t* io) except -1
