"""Aligned buffers for I/O whose own buffers are not. Context: reactor."""

from drivebay.bdev.base cimport channel_t, io_t

cdef enum:
    BOUNCE_BYTES = 131072
    BOUNCE_COUNT = 8

cdef int bounce_submit(channel_t* channel, io_t* io) noexcept nogil
