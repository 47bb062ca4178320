"""What both kinds of ring share: the struct, chains, tokens, and why a ring is given up.

Context: reactor, one owner a queue. split_virtqueue and packed_virtqueue know how a
ring lies in memory; virtqueue chooses between them.

Nothing a driver writes is trusted: each index, address and length is read once
into a local and checked there. A mistake in the ring's own structure is
POP_BAD_RING, and the queue is given up; the reason is in vq.fault.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.dataplane.inflight cimport inflight_t
from drivebay.memory.guest_memory cimport memtable_resolve, memtable_t
from drivebay.reactor.io cimport BLOCK_IOVECS, iovec
from drivebay.wire.virtio_ring cimport (
    VIRTQ_DESC_F_WRITE, virtq_avail, virtq_desc, virtq_packed_desc, virtq_packed_event, virtq_used,
)

cdef enum:
    POP_CHAIN = 0
    POP_EMPTY = 1
    POP_BAD_RING = 2

# Why a ring was given up; their sentences are in ring.pyx.
cdef enum:
    FAULT_NONE = 0
    FAULT_AVAIL_JUMP = 1
    FAULT_HEAD_RANGE = 2
    FAULT_HEAD_TWICE = 3
    FAULT_NEXT_RANGE = 4
    FAULT_CHAIN_LONG = 5
    FAULT_ADDRESS = 6
    FAULT_INDIRECT_LENGTH = 7
    FAULT_INDIRECT_NESTED = 8
    FAULT_INDIRECT_OFF = 9
    FAULT_ORDER = 10
    FAULT_CALL_BLOCKED = 11
    FAULT_WATCH = 12
    FAULT_OVERCOMMIT = 13
    FAULT_INDIRECT_MIXED = 14
    FAULT_INFLIGHT = 15

# One request's buffers in host addresses: readable ones, then writable ones.
cdef struct chain_t:
    uint32_t readable           # iovecs
    uint32_t writable
    uint64_t readable_bytes
    uint64_t writable_bytes
    iovec iov[BLOCK_IOVECS]

# What the driver knows a chain by, from the pop to the used element.
cdef struct token_t:
    uint16_t id                 # split: its head, checked; packed: only stored, never an index
    uint16_t count              # packed: the descriptors of the ring that it takes
    uint16_t entry              # its entry in the inflight region, if there is one
    uint16_t kept               # an earlier target took it: it is not taken from the ring again

# Positions run free in both kinds of ring and wrap at 65,536; the index is `& mask`. In a
# packed ring the bit above the index is the wrap counter, inverted (its first lap has 1).
cdef struct virtqueue_t:
    uint8_t packed              # VIRTIO_F_RING_PACKED negotiated
    uint8_t event_idx           # VIRTIO_RING_F_EVENT_IDX negotiated
    uint8_t indirect            # VIRTIO_RING_F_INDIRECT_DESC negotiated
    uint8_t fault
    uint32_t fault_value        # the value that was wrong
    uint16_t size               # power of two, at most 1,024
    uint16_t mask
    uint16_t next_avail         # next entry to take
    uint16_t avail_seen         # where the driver was, as seen last; packed: at most there
    uint16_t next_used          # next entry to fill
    uint16_t published          # what lies before it is shown to the driver
    uint16_t announced          # what lies before it the driver was told of, if it wanted
    uint16_t first_flags        # packed: of the descriptor at published, shown last
    uint16_t stride             # packed: descriptors of the last chain
    virtq_desc* desc            # host addresses of a split ring, checked by BlkQueue
    virtq_avail* avail
    virtq_used* used
    uint8_t* busy               # split: per head: taken, and not given back
    virtq_packed_desc* ring     # host addresses of a packed ring, checked by BlkQueue
    const virtq_packed_event* driver_event
    virtq_packed_event* device_event
    virtq_packed_desc* walked   # packed: the descriptors of the last walk, as they were read
    inflight_t inflight         # what the front end keeps for the next target

cdef str fault_sentence(uint8_t fault, uint32_t value)

cdef inline int virtqueue_bad(virtqueue_t* vq, uint8_t fault, uint32_t value) noexcept nogil:
    vq.fault = fault
    vq.fault_value = value
    return POP_BAD_RING

cdef inline void virtqueue_distrust(virtqueue_t* vq, uint16_t id) noexcept nogil:
    """The inflight region holds nonsense: touch it no more, and give the ring up."""
    vq.inflight.split = NULL
    vq.inflight.packed = NULL
    virtqueue_bad(vq, FAULT_INFLIGHT, id)

cdef inline void chain_clear(chain_t* chain) noexcept nogil:
    chain.readable = 0
    chain.writable = 0
    chain.readable_bytes = 0
    chain.writable_bytes = 0

cdef inline int chain_add(
    virtqueue_t* vq, const memtable_t* table, chain_t* chain,
    uint64_t address, uint64_t left, uint16_t flags
) noexcept nogil:
    """Translate one descriptor; it may span regions. Bound: BLOCK_IOVECS."""
    cdef uint64_t part
    cdef uint32_t at
    cdef uint8_t* host
    cdef bint writable = flags & VIRTQ_DESC_F_WRITE
    if not writable and chain.writable:
        return virtqueue_bad(vq, FAULT_ORDER, flags)
    while left:
        part = left
        host = memtable_resolve(table, address, &part)
        at = chain.readable + chain.writable
        if host == NULL or at == BLOCK_IOVECS:
            return virtqueue_bad(vq, FAULT_ADDRESS, <uint32_t>(address >> 12))
        chain.iov[at].iov_base = host
        chain.iov[at].iov_len = part
        if writable:
            chain.writable += 1
            chain.writable_bytes += part
        else:
            chain.readable += 1
            chain.readable_bytes += part
        address += part
        left -= part
    return POP_CHAIN
