"""A bdev that only hands on: the pattern of a filter."""

from drivebay.bdev.base cimport Bdev, Channel

cdef class PassthruChannel(Channel):
    pass

cdef class PassthruBdev(Bdev):
    pass
