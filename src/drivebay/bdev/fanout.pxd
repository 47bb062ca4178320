"""An I/O that goes to several places: its children, and how they become one again.

A module that fans out has one Fanout a channel. fan_out() asks its ``next_child`` for one
child after the other, submits each, and ends the parent when the last is back. Children
and their parents' records come from lists of the channel; who finds one empty waits, and
no I/O fails for want of them. Context: reactor.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from drivebay.bdev.base cimport channel_t, io_t, iovec
from drivebay.reactor.io cimport IO_INLINE_IOVECS, io_list_t, iovec_block_t

cdef enum:
    FANS = 64               # parents at once a channel
    CHILDREN = 256

cdef struct child_t:
    io_t io                 # first
    iovec iov[IO_INLINE_IOVECS]
    iovec_block_t* block    # borrowed for more buffers than fit inline
    child_t* next
    fan_t* fan
    uint32_t word           # the module's own

cdef struct fan_t:
    io_t* parent
    fanout_t* fanout
    const fan_ops_t* ops
    fan_t* next
    uint32_t outstanding
    int32_t status          # the parent's, in the end; the first error of a child
    uint64_t position       # the module's own: how far its children go, which bases have it …
    uint64_t word

cdef struct fan_ops_t:
    # Make the next child: io.offset, io.length, flags if not the parent's, and its buffers by
    # child_slice(). Returns the channel that it goes to, or NULL when there is no other, or
    # when child_slice() said no: then it is asked again for the same child.
    channel_t* (*next_child)(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil
    # Optional: a child is back. Without it the first error is the parent's status.
    void (*joined)(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil
    # Optional: all are back, the parent is about to end with fan.status.
    void (*ended)(channel_t* channel, fan_t* fan) noexcept nogil

cdef struct fanout_t:
    channel_t* channel
    child_t* children       # free ones
    fan_t* fans             # free ones
    child_t* new_children   # so many that were never used: nobody has touched their memory
    fan_t* new_fans
    uint32_t new_child_count
    uint32_t new_fan_count
    fan_t* starved          # those that wait for a child, the oldest first
    fan_t* starved_last
    io_list_t waiting       # parents without a record; their ops in io.engine
    iovec_block_t* own      # for when the reactor has no block
    bint own_lent
    bint blockless          # a child could not have the block that it needs

cdef int fan_out(fanout_t* fanout, io_t* parent, const fan_ops_t* ops) noexcept nogil
cdef bint child_slice(child_t* child, uint64_t start, uint64_t length) noexcept nogil

cdef class Fanout:
    cdef fanout_t raw
    cdef void* memory
    cdef size_t memory_bytes
