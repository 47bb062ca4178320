"""The inflight region of one queue: what a front end keeps while its target is away.

Each chain is marked before the next one is taken, and the marks are cleared after its
used element was shown. So the next target knows which requests were not answered, and in
which order they came. Source: vhost-user, "Inflight I/O tracking".

The front end shares this memory and may write anything into it at any time: every index
that is read from it is checked, every walk has a bound, and nonsense gives the queue up.
Context: reactor, one owner a queue; recovery in control, before the queue starts.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.memory.guest_memory cimport MemoryTable
from drivebay.memory.platform cimport load_once_16, load_relaxed_u16
from drivebay.wire.virtio_ring cimport (
    virtq_inflight_packed, virtq_inflight_split, virtq_packed_desc,
)

cdef struct inflight_t:
    virtq_inflight_split* split     # one of the two, or neither: nothing is kept
    virtq_inflight_packed* packed
    uint64_t counter                # of the next chain: the order in which they came
    uint16_t num                    # entries: at least the ring's size
    uint16_t filled                 # given back, but not shown yet
    # Packed only. What the region says of itself is not read back: it is the front end's.
    uint16_t size                   # of the ring, where the used index wraps
    uint16_t used                   # used index, with all that was given back
    uint8_t used_wrap
    uint16_t shown                  # the same as the driver sees it
    uint8_t shown_wrap
    uint16_t free                   # first entry that nobody has
    uint16_t given                  # first of those given back and not shown, if any
    uint16_t given_end              # last entry of those

# A chain was taken. Split: the entry is its head. Returns: the entry, or -1 for nonsense.
cdef int inflight_take_split(inflight_t* inflight, uint16_t head) noexcept nogil
# Packed: its descriptors as they were in the ring, in chain order. Take no chain twice:
# what may have to wait for something (a block of iovecs) waits before it is taken.
cdef int inflight_take_packed(
    inflight_t* inflight, const virtq_packed_desc* descs, uint16_t count, uint16_t id
) noexcept nogil
# Its used element is filled, but not shown yet. Packed: everything that was given since the
# last settle is shown by one store, that of the first one's flags; the others' come before.
cdef void inflight_give(inflight_t* inflight, uint16_t entry) noexcept nogil
# All that was filled has been shown: the marks go. used: the used index (packed: bit 15 wrap).
# Nothing is taken between the showing and this.
cdef void inflight_settle(inflight_t* inflight, uint16_t used) noexcept nogil

# A chain that was not answered, to be submitted again.
cdef struct recovered_t:
    uint64_t counter
    uint16_t entry
    uint16_t count      # descriptors of a packed ring that it takes; split: 1
    uint16_t id         # split: its head

cdef inline bint inflight_descriptor(
    const inflight_t* inflight, uint16_t entry, virtq_packed_desc* into, uint16_t* next
) noexcept nogil:
    """One kept descriptor of a packed chain, read once, and the chain's next entry.

    False: the region has no such entry.
    """
    cdef uint64_t words[2]
    if entry >= inflight.num:
        return False
    load_once_16(words, &inflight.packed.desc[entry].id)
    into.id = <uint16_t>words[0]
    into.flags = <uint16_t>(words[0] >> 16)
    into.len = <uint32_t>(words[0] >> 32)
    into.addr = words[1]
    next[0] = load_relaxed_u16(&inflight.packed.desc[entry].next)
    return True

cdef class InflightQueue:
    """One queue's part of a region. recover_*() once; then `raw` is the queue's to use."""
    cdef readonly int index
    cdef InflightRegion region      # keeps the mapping
    cdef inflight_t raw
    # What recover_*() found: where the queue goes on, and what it submits again before.
    cdef uint32_t base              # split: next avail; packed: as a packed ring's VRING_BASE
    cdef uint16_t taken             # packed: descriptors of the ring in these chains
    cdef uint16_t count
    cdef recovered_t* chains        # in the order in which they came
    cdef bint recovered
    cdef bint resumed               # the region was in use before

    # used: used.idx of the ring. base: SET_VRING_BASE's value, which only a new region heeds.
    cdef int recover_split(self, uint16_t size, uint16_t used, uint16_t base) except -1
    cdef int recover_packed(
        self, virtq_packed_desc* ring, uint16_t size, uint32_t base) except -1
    cdef int begin(self, uint16_t size, uint16_t version, uint16_t desc_num) except -1
    cdef int keep(self, recovered_t* found, uint16_t count) except -1
    cdef int roll(self, virtq_packed_desc* ring) except -1
    cdef int chain(self, uint16_t entry, uint8_t* seen, recovered_t* found) except -1

cdef class InflightRegion:
    cdef MemoryTable table
    cdef readonly int num_queues
    cdef readonly int queue_size
    cdef readonly bint packed
    cdef readonly bint has_tail
    cdef uint8_t* host
