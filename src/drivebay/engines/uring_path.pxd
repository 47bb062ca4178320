"""What every request passes: submission to an io_uring, and completion. Context: reactor.

The engine continues short transfers by itself and completes each I/O from its
poll. What is prepared is submitted once per turn.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from drivebay.reactor.io cimport io_list_t, io_t
from drivebay.reactor.reactor cimport engine_t, reactor_t

cdef enum:
    URING_FILES = 1024
    URING_TURN_BYTES = 8388608  # what a turn submits: the kernel copies cached pages at once

cdef struct uring_t:
    engine_t engine         # first: the reactor knows only this
    int ring
    uint32_t entries
    uint32_t sq_mask
    uint32_t cq_mask
    uint32_t tail           # of the submission queue, as filled so far
    uint32_t* sq_head
    uint32_t* sq_tail
    uint32_t* sq_flags
    uint32_t* cq_head
    uint32_t* cq_tail
    uint32_t* cq_flags
    void* sqes
    void* cqes
    uring_t* plain          # of a polled ring: takes what the device does not poll; else NULL
    int64_t budget          # bytes that this turn may still bring to the kernel
    io_list_t waiting       # those without room in ring or budget
    uint32_t free_count     # of the places in the ring's table of files
    uint16_t free_places[URING_FILES]

# io_t.engine, and what uring_start() takes: a descriptor and these.
cdef uint64_t URING_WORKER      # always by one of the kernel's threads: the file may block
cdef uint64_t URING_PLACE       # no descriptor, but a place in the ring's table of files
cdef uint64_t URING_POLLED      # as long as a polled ring tries it

cdef void uring_start(uring_t* uring, io_t* io, uint64_t file) noexcept nogil

# engine_t's functions
cdef void uring_flush(engine_t* engine, reactor_t* reactor) noexcept nogil
cdef int uring_poll_device(engine_t* engine, reactor_t* reactor) noexcept nogil
cdef int uring_poll(engine_t* engine, reactor_t* reactor) noexcept nogil
cdef bint uring_arm(engine_t* engine, bint armed) noexcept nogil
