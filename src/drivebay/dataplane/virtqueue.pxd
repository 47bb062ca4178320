"""A virtqueue, device side, of whatever kind. Context: reactor, one owner a queue.

In the order of use: look, then for each chain pop, walk and take (or, if it must
wait, not take: the next pop gives it again); fill when a request is done; publish
once a poll. A chain that was taken must be filled, exactly once.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from drivebay.dataplane.dirty_log cimport dirty_log_host, dirty_log_t
from drivebay.dataplane.inflight cimport recovered_t
from drivebay.dataplane.packed_virtqueue cimport (
    packed_arm, packed_disarm, packed_fill, packed_look, packed_off_wrap, packed_pop,
    packed_prefetch, packed_publish, packed_set_base, packed_take, packed_walk, packed_walk_again,
    packed_wants_call,
)
from drivebay.dataplane.ring cimport chain_t, token_t, virtqueue_t
from drivebay.dataplane.split_virtqueue cimport (
    split_arm, split_disarm, split_fill, split_look, split_pop, split_prefetch, split_publish,
    split_take, split_walk, split_wants_call,
)
from drivebay.memory.guest_memory cimport memtable_t
from drivebay.memory.platform cimport fence_seq_cst, load_relaxed_u16
from drivebay.wire.virtio_ring cimport (
    virtq_avail, virtq_desc, virtq_packed_desc, virtq_packed_event, virtq_used, virtq_used_elem,
)

cdef inline void virtqueue_bind(
    virtqueue_t* vq, uint64_t descriptors, uint64_t driver, uint64_t device
) noexcept nogil:
    """Host addresses of the ring's three areas, which were checked."""
    if vq.packed:
        vq.ring = <virtq_packed_desc*>descriptors
        vq.driver_event = <const virtq_packed_event*>driver
        vq.device_event = <virtq_packed_event*>device
    else:
        vq.desc = <virtq_desc*>descriptors
        vq.avail = <virtq_avail*>driver
        vq.used = <virtq_used*>device

cdef inline uint32_t virtqueue_base(const virtqueue_t* vq) noexcept nogil:
    """Where the ring stands, as VHOST_USER_GET_VRING_BASE says it."""
    if vq.packed:
        return (<uint32_t>packed_off_wrap(vq, vq.next_used) << 16
                | packed_off_wrap(vq, vq.next_avail))
    return vq.next_avail

cdef inline void virtqueue_set_base(virtqueue_t* vq, uint32_t base) noexcept nogil:
    """Go on from there; the used index of a split ring stands in its memory, which is bound."""
    if vq.packed:
        packed_set_base(vq, base)
    else:
        vq.next_avail = <uint16_t>base
        vq.next_used = load_relaxed_u16(&vq.used.idx)
    vq.avail_seen = vq.next_avail
    vq.published = vq.announced = vq.next_used

cdef inline int virtqueue_look(virtqueue_t* vq) noexcept nogil:
    """See what is new. Returns: POP_CHAIN when there are chains to pop."""
    if vq.packed:
        return packed_look(vq)
    return split_look(vq)

cdef inline uint16_t virtqueue_seen(const virtqueue_t* vq) noexcept nogil:
    """How many chains there are to pop at most, as look has seen; in a packed ring, roughly."""
    return vq.avail_seen - vq.next_avail

cdef inline int virtqueue_pop(virtqueue_t* vq, token_t* token) noexcept nogil:
    """The next chain that look has seen; it is not taken yet."""
    if vq.packed:
        return packed_pop(vq, token)
    return split_pop(vq, token)

cdef inline int virtqueue_walk(
    virtqueue_t* vq, const memtable_t* table, token_t* token, chain_t* chain
) noexcept nogil:
    """Translate the chain that was popped. Returns: POP_CHAIN or POP_BAD_RING. Bound: vq.size."""
    if vq.packed:
        return packed_walk(vq, table, token, chain)
    return split_walk(vq, table, token.id, chain)

cdef inline int virtqueue_walk_again(
    virtqueue_t* vq, const memtable_t* table, const recovered_t* kept, token_t* token,
    chain_t* chain
) noexcept nogil:
    """A chain that an earlier target took and did not answer; serve it as one that was popped."""
    token.id = kept.id
    token.count = kept.count
    token.entry = kept.entry
    token.kept = 1
    if vq.packed:
        return packed_walk_again(vq, table, kept, chain)
    return split_walk(vq, table, kept.id, chain)

cdef inline void virtqueue_take(virtqueue_t* vq, token_t* token) noexcept nogil:
    """It is ours now, until it is filled."""
    if vq.packed:
        packed_take(vq, token)
    else:
        split_take(vq, token)

cdef inline void virtqueue_fill(
    virtqueue_t* vq, const token_t* token, uint32_t written
) noexcept nogil:
    """A used element; invisible to the driver until virtqueue_publish()."""
    if vq.packed:
        packed_fill(vq, token, written)
    else:
        split_fill(vq, token, written)

cdef inline void virtqueue_publish(virtqueue_t* vq) noexcept nogil:
    """Show the driver what was filled."""
    if vq.published == vq.next_used:
        return
    if vq.packed:
        packed_publish(vq)
    else:
        split_publish(vq)

cdef inline bint virtqueue_announce(virtqueue_t* vq) noexcept nogil:
    """After a publish: does the driver want to be told? Asked once for what was shown.

    Better not at once: the fence waits until the driver's core has seen what was stored.
    """
    cdef uint16_t count = vq.published - vq.announced
    if count == 0:
        return False
    vq.announced = vq.published
    fence_seq_cst()     # what was shown is visible before the driver's wish is read
    if vq.packed:
        return packed_wants_call(vq, count)
    return split_wants_call(vq, count)

cdef inline bint virtqueue_arm(virtqueue_t* vq) noexcept nogil:
    """Ask for kicks, then look once more. True: work is there."""
    if vq.packed:
        return packed_arm(vq)
    return split_arm(vq)

cdef inline void virtqueue_disarm(virtqueue_t* vq) noexcept nogil:
    """No kicks wanted."""
    if vq.packed:
        packed_disarm(vq)
    else:
        split_disarm(vq)

cdef inline void virtqueue_prefetch(virtqueue_t* vq, uint16_t count) noexcept nogil:
    """Bring the descriptors of the next chains near. Bound: vq.size."""
    if vq.packed:
        packed_prefetch(vq)
    else:
        split_prefetch(vq, count)

cdef inline void virtqueue_log(
    const virtqueue_t* vq, const dirty_log_t* log, const memtable_t* table
) noexcept nogil:
    """Mark the areas that we write to, whole: a migration that logs rings copies them anyway."""
    if vq.packed:
        dirty_log_host(log, table, vq.ring, vq.size * sizeof(virtq_packed_desc))
        dirty_log_host(log, table, vq.device_event, sizeof(virtq_packed_event))
    else:
        dirty_log_host(log, table, vq.used, sizeof(virtq_used) + sizeof(uint16_t)
                       + vq.size * sizeof(virtq_used_elem))
