"""bdev_submit: the one door to every bdev. Context: reactor."""

from drivebay.bdev.base cimport channel_t, io_t

cdef int bdev_submit(channel_t* channel, io_t* io) noexcept nogil
cdef void channel_release_held(channel_t* channel) noexcept nogil
