"""raid0 and concat: an address of the disk belongs to exactly one base.

Context: reactor, except the classes.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t
from drivebay.bdev.fanout cimport Fanout, fanout_t

cdef struct part_t:             # what the disk has of one base
    uint64_t data_offset        # bytes, on the base
    uint64_t end                # concat: of the disk, where this base's part ends

cdef struct geometry_t:
    part_t* parts
    uint64_t strip              # bytes, a power of two
    uint32_t strip_shift
    uint32_t count

cdef struct striped_t:          # one channel's
    const geometry_t* geometry
    channel_t** bases
    fanout_t* fanout

cdef uint32_t common_operations(list bases)

cdef class StripedBdev(Bdev):
    cdef geometry_t geometry
    cdef str level
    cdef object raid

cdef class StripedChannel(Channel):
    cdef striped_t striped
    cdef Fanout fanout
