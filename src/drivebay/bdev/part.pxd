"""A bdev that is a range of its base: what split and gpt bdevs have in common."""

from drivebay.bdev.base cimport Bdev, Channel

cdef class PartChannel(Channel):
    pass

cdef class PartBdev(Bdev):
    cdef readonly object offset_blocks
    cdef object own_blocks
