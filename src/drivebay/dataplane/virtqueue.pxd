"""A virtqueue, device side, of whatever kind. Context: reactor, one owner a queue.

In the order of use: look, then for each chain pop, walk and take (or, if it must
wait, not take: the next pop gives it again); fill when a request is done; publish
once a poll. A chain that was taken must be filled, exactly once.
"""

from libc.stdint cimport uint16_t, uint32_t

from drivebay.dataplane.ring cimport POP_CHAIN, POP_EMPTY, chain_t, token_t, virtqueue_t
from drivebay.dataplane.split_virtqueue cimport (
    split_arm, split_disarm, split_fill, split_look, split_pop, split_prefetch, split_publish,
    split_take, split_walk,
)
from drivebay.memory.guest_memory cimport memtable_t

cdef inline int virtqueue_look(virtqueue_t* vq) noexcept nogil:
    """See what is new. Returns: POP_CHAIN when there are chains to pop."""
    return split_look(vq)

cdef inline uint16_t virtqueue_seen(const virtqueue_t* vq) noexcept nogil:
    """How many chains that look has seen were not taken."""
    return vq.avail_seen - vq.next_avail

cdef inline int virtqueue_pop(virtqueue_t* vq, token_t* token) noexcept nogil:
    """The next chain that look has seen; it is not taken yet."""
    return split_pop(vq, token)

cdef inline int virtqueue_walk(
    virtqueue_t* vq, const memtable_t* table, token_t* token, chain_t* chain
) noexcept nogil:
    """Translate the chain that was popped. Returns: POP_CHAIN or POP_BAD_RING. Bound: vq.size."""
    return split_walk(vq, table, token.id, chain)

cdef inline void virtqueue_take(virtqueue_t* vq, token_t* token) noexcept nogil:
    """It is ours now, until it is filled."""
    split_take(vq, token)

cdef inline void virtqueue_fill(
    virtqueue_t* vq, const token_t* token, uint32_t written
) noexcept nogil:
    """A used element; invisible to the driver until virtqueue_publish()."""
    split_fill(vq, token, written)

cdef inline bint virtqueue_publish(virtqueue_t* vq) noexcept nogil:
    """Show the driver what was filled. Returns: whether it wants a notification."""
    return split_publish(vq)

cdef inline bint virtqueue_arm(virtqueue_t* vq) noexcept nogil:
    """Ask for kicks, then look once more. True: work is there."""
    return split_arm(vq)

cdef inline void virtqueue_disarm(virtqueue_t* vq) noexcept nogil:
    """No kicks wanted."""
    split_disarm(vq)

cdef inline void virtqueue_prefetch(virtqueue_t* vq, uint16_t count) noexcept nogil:
    """Bring the descriptors of the next chains near. Bound: count."""
    split_prefetch(vq, count)
