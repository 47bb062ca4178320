"""A bdev that is a range of its base: what split, gpt and error bdevs have in common."""

from libc.stdint cimport uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t

cdef struct part_t:
    channel_t* base
    uint64_t start          # of the part in its base, bytes

cdef class PartChannel(Channel):
    cdef part_t part

cdef class PartBdev(Bdev):
    cdef readonly object offset_blocks
    cdef object own_blocks
