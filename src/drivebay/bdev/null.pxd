"""The null bdev: completes everything at once and moves nothing."""

from drivebay.bdev.base cimport Bdev, Channel

cdef class NullBdev(Bdev):
    pass

cdef class NullChannel(Channel):
    pass
