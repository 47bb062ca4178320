"""Split virtqueue, device side (virtio 1.3 §2.7). Context: reactor, one owner a queue.

Reached through virtqueue, which describes each function; here is what a split ring does.
"""

from libc.stdint cimport uint16_t, uint32_t

from drivebay.dataplane.inflight cimport inflight_give, inflight_settle, inflight_take_split
from drivebay.dataplane.ring cimport (
    FAULT_AVAIL_JUMP, FAULT_HEAD_RANGE, FAULT_HEAD_TWICE, POP_CHAIN, POP_EMPTY, chain_t, token_t,
    virtqueue_bad, virtqueue_distrust, virtqueue_t,
)
from drivebay.memory.guest_memory cimport memtable_t
from drivebay.memory.platform cimport (
    fence_seq_cst, load_acquire_u16, load_relaxed_u16, prefetch_read, store_relaxed_u16,
    store_release_u16,
)
from drivebay.wire.virtio_ring cimport VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_USED_F_NO_NOTIFY

cdef int split_walk(
    virtqueue_t* vq, const memtable_t* table, uint16_t head, chain_t* chain
) noexcept nogil

cdef inline int split_look(virtqueue_t* vq) noexcept nogil:
    vq.avail_seen = load_acquire_u16(&vq.avail.idx)
    if vq.avail_seen == vq.next_avail:
        return POP_EMPTY
    if <uint16_t>(vq.avail_seen - vq.next_avail) > vq.size:
        return virtqueue_bad(vq, FAULT_AVAIL_JUMP, vq.avail_seen)
    return POP_CHAIN

cdef inline int split_pop(virtqueue_t* vq, token_t* token) noexcept nogil:
    if vq.avail_seen == vq.next_avail:
        return POP_EMPTY
    token.id = load_relaxed_u16(&vq.avail.ring[vq.next_avail & vq.mask])
    if token.id >= vq.size:
        return virtqueue_bad(vq, FAULT_HEAD_RANGE, token.id)
    if vq.busy[token.id]:
        return virtqueue_bad(vq, FAULT_HEAD_TWICE, token.id)
    token.kept = 0
    return POP_CHAIN

cdef inline void split_mark(virtqueue_t* vq, token_t* token) noexcept nogil:
    token.entry = token.id
    if inflight_take_split(&vq.inflight, token.id) < 0:
        virtqueue_distrust(vq, token.id)

cdef inline void split_take(virtqueue_t* vq, token_t* token) noexcept nogil:
    vq.busy[token.id] = 1
    if token.kept:
        return
    vq.next_avail += 1
    if vq.inflight.split != NULL:
        split_mark(vq, token)

cdef inline void split_fill(
    virtqueue_t* vq, const token_t* token, uint32_t written
) noexcept nogil:
    vq.used.ring[vq.next_used & vq.mask].id = token.id
    vq.used.ring[vq.next_used & vq.mask].len = written
    vq.next_used += 1
    vq.busy[token.id] = 0
    if vq.inflight.split != NULL:
        inflight_give(&vq.inflight, token.entry)

cdef inline uint16_t* split_used_event(virtqueue_t* vq) noexcept nogil:
    return &vq.avail.ring[vq.size]

cdef inline uint16_t* split_avail_event(virtqueue_t* vq) noexcept nogil:
    return <uint16_t*>&vq.used.ring[vq.size]

cdef inline void split_publish(virtqueue_t* vq) noexcept nogil:
    store_release_u16(&vq.used.idx, vq.next_used)
    vq.published = vq.next_used
    if vq.inflight.split != NULL:
        inflight_settle(&vq.inflight, vq.next_used)

cdef inline bint split_wants_call(virtqueue_t* vq, uint16_t count) noexcept nogil:
    """virtio 1.3 §2.7.7.2: with EVENT_IDX the flags are ignored, and the driver is
    notified when used.idx passes used_event.
    """
    if vq.event_idx:
        return <uint16_t>(vq.published - load_relaxed_u16(split_used_event(vq)) - 1) < count
    return not load_relaxed_u16(&vq.avail.flags) & VIRTQ_AVAIL_F_NO_INTERRUPT

cdef inline bint split_arm(virtqueue_t* vq) noexcept nogil:
    """virtio 1.3 §2.7.10."""
    if vq.event_idx:
        store_relaxed_u16(split_avail_event(vq), vq.next_avail)
    else:
        store_relaxed_u16(&vq.used.flags, 0)
    fence_seq_cst()
    return load_relaxed_u16(&vq.avail.idx) != vq.next_avail

cdef inline void split_disarm(virtqueue_t* vq) noexcept nogil:
    """With EVENT_IDX the old avail_event already lies behind."""
    if not vq.event_idx:
        store_relaxed_u16(&vq.used.flags, VIRTQ_USED_F_NO_NOTIFY)

cdef inline void split_prefetch(virtqueue_t* vq, uint16_t count) noexcept nogil:
    cdef uint16_t i, head
    for i in range(count):
        head = load_relaxed_u16(&vq.avail.ring[(vq.next_avail + i) & vq.mask])
        prefetch_read(&vq.desc[head & vq.mask])
