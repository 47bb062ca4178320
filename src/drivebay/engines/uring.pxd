"""One io_uring per reactor, shared by all its files. Context: reactor, except set-up.

The engine continues short transfers by itself and completes each I/O from its
poll. What is prepared is submitted once per turn.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from drivebay.reactor.io cimport io_t
from drivebay.reactor.reactor cimport Reactor, engine_t

cdef extern from "<linux/io_uring.h>" nogil:
    cdef struct io_sqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array
    cdef struct io_cqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags
    cdef struct io_uring_params:
        uint32_t sq_entries, cq_entries, flags, features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off

cdef enum:
    URING_FILES = 1024

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
    int64_t budget          # bytes that this turn may still bring to the kernel
    io_t* waiting           # first and last of those without room in ring or budget
    io_t* waiting_last
    uint32_t free_count     # of the places in the ring's table of files
    uint16_t free_places[URING_FILES]

# io_t.engine, and what uring_start() takes: a descriptor and these.
cdef uint64_t URING_WORKER      # always by one of the kernel's threads: the file may block
cdef uint64_t URING_PLACE       # no descriptor, but a place in the ring's table of files

cdef void uring_start(uring_t* uring, io_t* io, uint64_t file) noexcept nogil
cdef uint64_t uring_register(uring_t* uring, int fd) noexcept nogil
cdef void uring_unregister(uring_t* uring, uint64_t file) noexcept nogil

cdef class UringEngine:
    cdef uring_t raw
    cdef void* ring_memory
    cdef size_t ring_bytes
    cdef size_t sqe_bytes
    cdef int set_up(self, io_uring_params* params) except -1
    cdef int map_rings(self, io_uring_params* params) except -1

cdef UringEngine uring_of(Reactor reactor)
