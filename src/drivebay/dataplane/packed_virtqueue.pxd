"""Packed virtqueue, device side (virtio 1.3 §2.8). Context: reactor, one owner a queue.

Reached through virtqueue, which describes each function; here is what a packed ring does.
Deviation: sizes are powers of two up to 1,024, though the specification allows any, because
positions then run free as in a split ring; a transport may limit them so.
"""

from libc.stdint cimport int16_t, uint16_t, uint32_t

from drivebay.dataplane.inflight cimport (
    inflight_give, inflight_settle, inflight_take_packed, recovered_t,
)
from drivebay.dataplane.ring cimport (
    POP_CHAIN, POP_EMPTY, chain_t, token_t, virtqueue_distrust, virtqueue_t,
)
from drivebay.memory.guest_memory cimport memtable_t
from drivebay.memory.platform cimport (
    fence_seq_cst, load_acquire_u16, load_relaxed_u32, prefetch_read, store_release_u16,
    store_release_u32,
)
from drivebay.wire.virtio_ring cimport (
    VIRTQ_DESC_F_WRITE, VIRTQ_EVENT_F_DESC, VIRTQ_EVENT_F_DISABLE, VIRTQ_EVENT_F_ENABLE,
    VIRTQ_EVENT_WRAP, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED, virtq_packed_desc,
)

cdef int packed_walk(
    virtqueue_t* vq, const memtable_t* table, token_t* token, chain_t* chain
) noexcept nogil

# The same for a chain that an earlier target took; its descriptors are in the region.
cdef int packed_walk_again(
    virtqueue_t* vq, const memtable_t* table, const recovered_t* kept, chain_t* chain
) noexcept nogil

cdef inline bint packed_wrap(const virtqueue_t* vq, uint16_t position) noexcept nogil:
    """The wrap counter there; it begins with 1."""
    return not position & vq.size

cdef inline uint16_t packed_position(const virtqueue_t* vq, uint16_t off_wrap) noexcept nogil:
    """The position that an index and its wrap counter (bit 15) mean."""
    return (off_wrap & vq.mask) + (0 if off_wrap & VIRTQ_EVENT_WRAP else vq.size)

cdef inline uint16_t packed_off_wrap(const virtqueue_t* vq, uint16_t position) noexcept nogil:
    return (position & vq.mask) | (VIRTQ_EVENT_WRAP if packed_wrap(vq, position) else 0)

cdef inline void packed_set_base(virtqueue_t* vq, uint32_t base) noexcept nogil:
    """Deviation: a base without a used half means that nothing was in flight, because front
    ends exist that know only the older form of the message.
    """
    cdef uint16_t avail = packed_position(vq, <uint16_t>base)
    vq.next_used = packed_position(vq, <uint16_t>(base >> 16)) if base >> 16 else avail
    vq.next_avail = vq.next_used + ((avail - vq.next_used) & (2 * vq.size - 1))

cdef inline bint packed_is_available(const virtqueue_t* vq, uint16_t position) noexcept nogil:
    """virtio 1.3 §2.8.1: AVAIL is the driver's wrap counter, USED the opposite."""
    cdef uint16_t flags = load_acquire_u16(&vq.ring[position & vq.mask].flags)
    return (flags & (VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED)) == (
        VIRTQ_PACKED_DESC_F_AVAIL if packed_wrap(vq, position) else VIRTQ_PACKED_DESC_F_USED)

cdef inline int packed_look(virtqueue_t* vq) noexcept nogil:
    """How far the driver got, roughly: a look per chain, if all are as long as the last one.

    The first descriptor of a chain is flagged last, others are only a hint; pop looks at the
    first. Bound: vq.size.
    """
    while (<uint16_t>(vq.avail_seen - vq.next_avail) < vq.size
           and packed_is_available(vq, vq.avail_seen)):
        vq.avail_seen += vq.stride
    return POP_EMPTY if vq.avail_seen == vq.next_avail else POP_CHAIN

cdef inline int packed_pop(virtqueue_t* vq, token_t* token) noexcept nogil:
    """A chain's id stands in its last descriptor, so the walk sets the token."""
    if packed_is_available(vq, vq.next_avail):
        token.kept = 0
        return POP_CHAIN
    vq.avail_seen = vq.next_avail
    return POP_EMPTY

cdef inline void packed_mark(virtqueue_t* vq, token_t* token) noexcept nogil:
    cdef int entry = inflight_take_packed(&vq.inflight, vq.walked, token.count, token.id)
    if entry < 0:
        virtqueue_distrust(vq, token.id)
    token.entry = <uint16_t>entry

cdef inline void packed_take(virtqueue_t* vq, token_t* token) noexcept nogil:
    if token.kept:
        return
    vq.stride = token.count
    vq.next_avail += token.count
    if <int16_t>(vq.avail_seen - vq.next_avail) < 0:
        vq.avail_seen = vq.next_avail
    if vq.inflight.packed != NULL:
        packed_mark(vq, token)

cdef inline void packed_fill(
    virtqueue_t* vq, const token_t* token, uint32_t written
) noexcept nogil:
    """One used descriptor in place of the chain; the ring goes on behind as many as it took.

    virtio 1.3 §2.8.4: WRITE says whether len is valid. The batch's first descriptor is flagged
    last: the driver looks there, and then all of them are there.
    """
    cdef virtq_packed_desc* desc = &vq.ring[vq.next_used & vq.mask]
    cdef uint16_t flags = VIRTQ_DESC_F_WRITE if written else 0
    if packed_wrap(vq, vq.next_used):
        flags |= VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED
    desc.id = token.id
    desc.len = written
    if vq.next_used == vq.published:
        vq.first_flags = flags
    else:
        store_release_u16(&desc.flags, flags)
    vq.next_used += token.count
    if vq.inflight.packed != NULL:
        inflight_give(&vq.inflight, token.entry)

cdef inline void packed_publish(virtqueue_t* vq) noexcept nogil:
    store_release_u16(&vq.ring[vq.published & vq.mask].flags, vq.first_flags)
    vq.published = vq.next_used
    if vq.inflight.packed != NULL:
        inflight_settle(&vq.inflight, packed_off_wrap(vq, vq.next_used))

cdef inline bint packed_wants_call(virtqueue_t* vq, uint16_t count) noexcept nogil:
    """virtio 1.3 §2.8.10: the driver's area says when it wants to be told."""
    cdef uint16_t distance
    cdef uint32_t event = load_relaxed_u32(vq.driver_event), wish = event >> 16 & 3
    if vq.event_idx and wish == VIRTQ_EVENT_F_DESC:
        # How far behind the batch's end the wish lies, as positions repeat after two laps.
        distance = vq.published - 1 - packed_position(vq, <uint16_t>event)
        return distance & (2 * vq.size - 1) < count
    return wish != VIRTQ_EVENT_F_DISABLE

cdef inline bint packed_arm(virtqueue_t* vq) noexcept nogil:
    cdef uint32_t event = VIRTQ_EVENT_F_ENABLE << 16
    if vq.event_idx:
        event = VIRTQ_EVENT_F_DESC << 16 | packed_off_wrap(vq, vq.next_avail)
    store_release_u32(vq.device_event, event)
    fence_seq_cst()
    return packed_is_available(vq, vq.next_avail)

cdef inline void packed_disarm(virtqueue_t* vq) noexcept nogil:
    """Said also with EVENT_IDX: a wish that lies behind comes round again after two laps."""
    store_release_u16(&vq.device_event.flags, VIRTQ_EVENT_F_DISABLE)

cdef inline void packed_prefetch(virtqueue_t* vq) noexcept nogil:
    """A cache line has four descriptors. Bound: vq.size."""
    cdef uint16_t at = vq.next_avail
    while <int16_t>(vq.avail_seen - at) > 0:
        prefetch_read(&vq.ring[at & vq.mask])
        at += 4
