"""Control's own way to read and write a bdev."""

from libc.stdint cimport uint8_t

from drivebay.bdev.base cimport Channel, io_t, iovec

cdef class Transfer:
    cdef io_t io
    cdef iovec part
    cdef uint8_t* buffer
    cdef object what
