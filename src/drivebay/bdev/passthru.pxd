"""A bdev that only hands on: the pattern of a filter."""

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.bdev.filter cimport FilterBdev

cdef class PassthruChannel(Channel):
    pass

cdef class PassthruBdev(FilterBdev):
    pass
