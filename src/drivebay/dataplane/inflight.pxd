"""The inflight region of one queue: what a front end keeps while its target is away.

Each chain is marked before the next one is taken, and the marks are cleared after its
used element was shown. So the next target knows which requests were not answered, and in
which order they came. Source: vhost-user, "Inflight I/O tracking".

The front end shares this memory and may write anything into it at any time: every index
that is read from it is checked, every walk has a bound, and nonsense gives the queue up.
Context: reactor, one owner a queue; recovery in control, before the queue starts.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.wire.virtio_ring cimport (
    virtq_inflight_packed, virtq_inflight_split, virtq_packed_desc,
)

cdef struct inflight_t:
    virtq_inflight_split* split     # one of the two, or neither: nothing is kept
    virtq_inflight_packed* packed
    uint64_t counter                # of the next chain: the order in which they came
    uint16_t num                    # entries: at least the ring's size
    uint16_t filled                 # given back, but not shown yet

# A chain was taken. Split: the entry is its head. Returns: the entry, or -1 for nonsense.
cdef int inflight_take_split(inflight_t* inflight, uint16_t head) noexcept nogil
# Packed: its descriptors as they were in the ring, in chain order.
cdef int inflight_take_packed(
    inflight_t* inflight, const virtq_packed_desc* descs, uint16_t count, uint16_t id
) noexcept nogil
# Its used element is filled, but not shown yet.
cdef void inflight_give(inflight_t* inflight, uint16_t entry) noexcept nogil
# All that was filled has been shown: the marks go. used: the used index (packed: bit 15 wrap).
cdef void inflight_settle(inflight_t* inflight, uint16_t used) noexcept nogil
