"""One io_uring per reactor, shared by all its files. Context: reactor, except set-up."""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.engines.uring_kernel cimport io_uring_params
from drivebay.engines.uring_path cimport uring_t
from drivebay.reactor.reactor cimport Reactor

cdef uint64_t uring_register(uring_t* uring, int fd) noexcept nogil
cdef void uring_unregister(uring_t* uring, uint64_t file) noexcept nogil

cdef class UringEngine:
    cdef uring_t raw
    cdef void* ring_memory
    cdef size_t ring_bytes
    cdef size_t sqe_bytes
    cdef UringEngine plain      # of a polled one
    cdef int set_up(self, io_uring_params* params, uint32_t more) except -1
    cdef int add_eventfd(self) except -1
    cdef int map_rings(self, io_uring_params* params) except -1

cdef UringEngine uring_of(Reactor reactor)
cdef UringEngine polled_uring_of(Reactor reactor)
