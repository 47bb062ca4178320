"""Walking a chain of a packed virtqueue. Context: reactor.

Every descriptor is copied once and checked as copied, as in a split ring; here the copies
are kept until the next walk, because used descriptors overwrite the ring's. Room in the ring
bounds a chain: what is in flight and it together never take more descriptors than there are.
"""

from libc.stdint cimport UINT64_MAX, uint16_t, uint32_t

from drivebay.dataplane.inflight cimport inflight_descriptor, recovered_t
from drivebay.dataplane.ring cimport (
    FAULT_ADDRESS, FAULT_CHAIN_LONG, FAULT_INDIRECT_LENGTH, FAULT_INDIRECT_MIXED,
    FAULT_INDIRECT_OFF, FAULT_OVERCOMMIT, POP_BAD_RING, POP_CHAIN, chain_add, chain_clear, chain_t,
    token_t, virtqueue_bad, virtqueue_distrust, virtqueue_t,
)
from drivebay.memory.guest_memory cimport memtable_read, memtable_t
from drivebay.memory.platform cimport load_once_16
from drivebay.wire.virtio_ring cimport (
    VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, virtq_packed_desc,
)


cdef int walk_indirect(
    virtqueue_t* vq, const memtable_t* table, const virtq_packed_desc* outer, chain_t* chain
) noexcept nogil:
    """virtio 1.3 §2.8.7: all descriptors of the table, in its order; of their flags only
    WRITE means anything. Bound: vq.size.
    """
    cdef uint32_t count = outer.len // sizeof(virtq_packed_desc), at
    cdef virtq_packed_desc desc
    if outer.len == 0 or outer.len % sizeof(virtq_packed_desc) or count > vq.size:
        return virtqueue_bad(vq, FAULT_INDIRECT_LENGTH, outer.len)
    if outer.addr > UINT64_MAX - outer.len:
        return virtqueue_bad(vq, FAULT_ADDRESS, <uint32_t>(outer.addr >> 12))
    for at in range(count):
        if not memtable_read(table, outer.addr + at * sizeof(desc), &desc, sizeof(desc)):
            return virtqueue_bad(vq, FAULT_ADDRESS, <uint32_t>(outer.addr >> 12))
        if chain_add(vq, table, chain, desc.addr, desc.len, desc.flags) != POP_CHAIN:
            return POP_BAD_RING
    return POP_CHAIN


cdef inline int add_descriptor(
    virtqueue_t* vq, const memtable_t* table, const virtq_packed_desc* desc, uint16_t before,
    chain_t* chain
) noexcept nogil:
    """Translate one descriptor of the ring, or the table that it refers to."""
    if not desc.flags & VIRTQ_DESC_F_INDIRECT:
        return chain_add(vq, table, chain, desc.addr, desc.len, desc.flags)
    if not vq.indirect:
        return virtqueue_bad(vq, FAULT_INDIRECT_OFF, (vq.next_avail + before) & vq.mask)
    # virtio 1.3 §2.8.17: a list has descriptors of one kind only.
    if before or desc.flags & VIRTQ_DESC_F_NEXT:
        return virtqueue_bad(vq, FAULT_INDIRECT_MIXED, before)
    return walk_indirect(vq, table, desc, chain)


cdef int packed_walk(
    virtqueue_t* vq, const memtable_t* table, token_t* token, chain_t* chain
) noexcept nogil:
    """Takes descriptors up to one without NEXT; the last one's id is the chain's."""
    cdef uint16_t count = 0, room = vq.size - <uint16_t>(vq.next_avail - vq.next_used)
    cdef virtq_packed_desc desc
    chain_clear(chain)
    while True:
        if count == room:
            if room < vq.size:
                return virtqueue_bad(vq, FAULT_OVERCOMMIT, room)
            return virtqueue_bad(vq, FAULT_CHAIN_LONG, vq.next_avail & vq.mask)
        load_once_16(&desc, &vq.ring[(vq.next_avail + count) & vq.mask])
        # By words, as it was stored: one load of 16 bytes would wait for both stores.
        load_once_16(&vq.walked[count], &desc)
        if add_descriptor(vq, table, &desc, count, chain) != POP_CHAIN:
            return POP_BAD_RING
        count += 1
        if not desc.flags & VIRTQ_DESC_F_NEXT:
            break
    token.id = desc.id
    token.count = count
    return POP_CHAIN


cdef int packed_walk_again(
    virtqueue_t* vq, const memtable_t* table, const recovered_t* kept, chain_t* chain
) noexcept nogil:
    """The ring's own may be overwritten by used ones. Bound: kept.count, which was checked."""
    cdef uint16_t i, at = kept.entry, following = 0
    cdef virtq_packed_desc desc
    chain_clear(chain)
    for i in range(kept.count):
        if not inflight_descriptor(&vq.inflight, at, &desc, &following):
            virtqueue_distrust(vq, kept.id)
            return POP_BAD_RING
        if add_descriptor(vq, table, &desc, i, chain) != POP_CHAIN:
            return POP_BAD_RING
        at = following
    return POP_CHAIN
