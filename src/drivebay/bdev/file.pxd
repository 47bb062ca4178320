"""The file bdevs, ``aio`` and ``uring``: two names over one io_uring engine."""

from libc.stdint cimport uint64_t

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.engines.uring cimport UringEngine
from drivebay.engines.uring_path cimport uring_t

# channel_t.module of a file channel
cdef struct file_t:
    uring_t* uring
    uring_t* polled         # NULL unless the device has poll queues
    int fd
    uint64_t handle         # fd, as the engine takes it

cdef class FileBdev(Bdev):
    cdef int fd
    cdef readonly str path
    cdef readonly str module
    cdef readonly str product_name
    cdef readonly bint direct
    cdef readonly bint polled
    cdef bint asked_block_size
    cdef object fallocate

cdef class FileChannel(Channel):
    cdef file_t file
    cdef UringEngine engine
    cdef UringEngine polled_engine
