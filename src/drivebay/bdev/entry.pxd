"""bdev_submit: the one door to every bdev. Context: reactor."""

from drivebay.bdev.base cimport channel_t, io_t
from drivebay.reactor.timer cimport timer_t

cdef int bdev_submit(channel_t* channel, io_t* io) noexcept nogil
cdef int submit_through(channel_t* channel, io_t* io) noexcept nogil
cdef void channel_drained(channel_t* channel) noexcept nogil
cdef void channel_release_held(channel_t* channel) noexcept nogil
cdef void channel_limits_changed(channel_t* channel) noexcept nogil
cdef void channel_let_pass(timer_t* timer, void* channel) noexcept nogil
