"""Split virtqueue, device side (virtio 1.3 §2.7). Context: reactor, one owner a queue.

Nothing a driver writes is trusted: each index, address and length is read once
into a local and checked there. A mistake in the ring's own structure is
POP_BAD_RING, and the queue is given up; the reason is in vq.fault.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.memory.guest_memory cimport memtable_t
from drivebay.memory.platform cimport (
    fence_seq_cst, load_acquire_u16, load_relaxed_u16, prefetch_read, store_relaxed_u16,
    store_release_u16,
)
from drivebay.reactor.io cimport BLOCK_IOVECS, iovec
from drivebay.wire.virtio_ring cimport (
    VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_USED_F_NO_NOTIFY, virtq_avail, virtq_desc, virtq_used,
)

cdef enum:
    POP_CHAIN = 0
    POP_EMPTY = 1
    POP_BAD_RING = 2

# Why a ring was given up; their sentences are in virtqueue.pyx.
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

# One request's buffers in host addresses: readable ones, then writable ones.
cdef struct chain_t:
    uint32_t readable           # iovecs
    uint32_t writable
    uint64_t readable_bytes
    uint64_t writable_bytes
    iovec iov[BLOCK_IOVECS]

cdef struct virtqueue_t:
    virtq_desc* desc            # host addresses, checked in virtqueue_bind
    virtq_avail* avail
    virtq_used* used
    uint16_t size               # power of two, at most 1,024
    uint16_t mask
    uint16_t next_avail         # next entry to take; free-running
    uint16_t avail_seen         # avail.idx as read last
    uint16_t next_used          # next entry to fill; free-running
    uint16_t published          # used.idx as the driver sees it
    uint8_t event_idx           # VIRTIO_RING_F_EVENT_IDX negotiated
    uint8_t indirect            # VIRTIO_RING_F_INDIRECT_DESC negotiated
    uint8_t fault
    uint32_t fault_value        # the value that was wrong

cdef int virtqueue_walk(
    virtqueue_t* vq, const memtable_t* table, uint16_t head, chain_t* chain
) noexcept nogil

cdef str fault_sentence(uint8_t fault, uint32_t value)

cdef inline int virtqueue_bad(virtqueue_t* vq, uint8_t fault, uint32_t value) noexcept nogil:
    vq.fault = fault
    vq.fault_value = value
    return POP_BAD_RING

cdef inline int virtqueue_look(virtqueue_t* vq) noexcept nogil:
    """Refresh avail_seen. Returns POP_CHAIN when there are entries to take."""
    vq.avail_seen = load_acquire_u16(&vq.avail.idx)
    if vq.avail_seen == vq.next_avail:
        return POP_EMPTY
    if <uint16_t>(vq.avail_seen - vq.next_avail) > vq.size:
        return virtqueue_bad(vq, FAULT_AVAIL_JUMP, vq.avail_seen)
    return POP_CHAIN

cdef inline int virtqueue_pop(virtqueue_t* vq, uint16_t* head) noexcept nogil:
    """The head of the next chain that virtqueue_look() has seen. Bound: none needed."""
    if vq.avail_seen == vq.next_avail:
        return POP_EMPTY
    head[0] = load_relaxed_u16(&vq.avail.ring[vq.next_avail & vq.mask])
    if head[0] >= vq.size:
        return virtqueue_bad(vq, FAULT_HEAD_RANGE, head[0])
    vq.next_avail += 1
    return POP_CHAIN

cdef inline void virtqueue_fill(virtqueue_t* vq, uint16_t head, uint32_t written) noexcept nogil:
    """A used element; invisible to the driver until virtqueue_publish()."""
    vq.used.ring[vq.next_used & vq.mask].id = head
    vq.used.ring[vq.next_used & vq.mask].len = written
    vq.next_used += 1

cdef inline uint16_t* virtqueue_used_event(virtqueue_t* vq) noexcept nogil:
    return &vq.avail.ring[vq.size]

cdef inline uint16_t* virtqueue_avail_event(virtqueue_t* vq) noexcept nogil:
    return <uint16_t*>&vq.used.ring[vq.size]

cdef inline bint virtqueue_publish(virtqueue_t* vq) noexcept nogil:
    """Show the driver what was filled. Returns: whether it wants a notification.

    virtio 1.3 §2.7.7.2: with EVENT_IDX the flags are ignored, and the driver is
    notified when used.idx passes used_event.
    """
    cdef uint16_t old = vq.published
    if old == vq.next_used:
        return False
    store_release_u16(&vq.used.idx, vq.next_used)
    vq.published = vq.next_used
    fence_seq_cst()     # the new index is visible before the driver's wish is read
    if vq.event_idx:
        return (<uint16_t>(vq.next_used - load_relaxed_u16(virtqueue_used_event(vq)) - 1)
                < <uint16_t>(vq.next_used - old))
    return not load_relaxed_u16(&vq.avail.flags) & VIRTQ_AVAIL_F_NO_INTERRUPT

cdef inline bint virtqueue_arm(virtqueue_t* vq) noexcept nogil:
    """Ask for kicks, then look once more (virtio 1.3 §2.7.10). True: work is there."""
    if vq.event_idx:
        store_relaxed_u16(virtqueue_avail_event(vq), vq.next_avail)
    else:
        store_relaxed_u16(&vq.used.flags, 0)
    fence_seq_cst()
    return load_relaxed_u16(&vq.avail.idx) != vq.next_avail

cdef inline void virtqueue_disarm(virtqueue_t* vq) noexcept nogil:
    """No kicks wanted. With EVENT_IDX the old avail_event already lies behind."""
    if not vq.event_idx:
        store_relaxed_u16(&vq.used.flags, VIRTQ_USED_F_NO_NOTIFY)

cdef inline void virtqueue_prefetch(virtqueue_t* vq, uint16_t count) noexcept nogil:
    """Bring the descriptors of the next chains near. Bound: count."""
    cdef uint16_t i, head
    for i in range(count):
        head = load_relaxed_u16(&vq.avail.ring[(vq.next_avail + i) & vq.mask])
        prefetch_read(&vq.desc[head & vq.mask])
