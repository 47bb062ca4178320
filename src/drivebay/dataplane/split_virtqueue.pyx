"""Walking a descriptor chain of a split virtqueue. Context: reactor.

Every descriptor is copied once and checked as copied, so that a driver which
changes it meanwhile harms nobody. Deviation: a chain may be as long as the ring,
indirect tables included; the specification allows it no more (virtio 1.3
§2.7.5.3.1), and that bound is what ends a looping chain.
"""

from libc.stdint cimport UINT64_MAX, uint16_t, uint32_t

from drivebay.dataplane.ring cimport (
    FAULT_ADDRESS, FAULT_CHAIN_LONG, FAULT_INDIRECT_LENGTH, FAULT_INDIRECT_NESTED,
    FAULT_INDIRECT_OFF, FAULT_NEXT_RANGE, POP_BAD_RING, POP_CHAIN, chain_add, chain_clear, chain_t,
    virtqueue_bad, virtqueue_t,
)
from drivebay.memory.guest_memory cimport memtable_read, memtable_t
from drivebay.memory.platform cimport load_once_16
from drivebay.wire.virtio_ring cimport VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, virtq_desc


cdef int walk_indirect(
    virtqueue_t* vq, const memtable_t* table, const virtq_desc* outer, uint32_t seen, chain_t* chain
) noexcept nogil:
    """virtio 1.3 §2.7.5.3: a table of descriptors elsewhere in memory. Bound: vq.size."""
    cdef uint32_t count = outer.len // sizeof(virtq_desc)
    cdef uint32_t at = 0
    cdef virtq_desc desc
    if outer.len == 0 or outer.len % sizeof(virtq_desc) or count > vq.size:
        return virtqueue_bad(vq, FAULT_INDIRECT_LENGTH, outer.len)
    if outer.addr > UINT64_MAX - outer.len:
        return virtqueue_bad(vq, FAULT_ADDRESS, <uint32_t>(outer.addr >> 12))
    while True:
        if seen >= vq.size:
            return virtqueue_bad(vq, FAULT_CHAIN_LONG, seen)
        seen += 1
        if not memtable_read(table, outer.addr + at * sizeof(desc), &desc, sizeof(desc)):
            return virtqueue_bad(vq, FAULT_ADDRESS, <uint32_t>(outer.addr >> 12))
        if desc.flags & VIRTQ_DESC_F_INDIRECT:
            return virtqueue_bad(vq, FAULT_INDIRECT_NESTED, at)
        if chain_add(vq, table, chain, desc.addr, desc.len, desc.flags) != POP_CHAIN:
            return POP_BAD_RING
        if not desc.flags & VIRTQ_DESC_F_NEXT:
            return POP_CHAIN
        at = desc.next
        if at >= count:
            return virtqueue_bad(vq, FAULT_NEXT_RANGE, at)


cdef int split_walk(
    virtqueue_t* vq, const memtable_t* table, uint16_t head, chain_t* chain
) noexcept nogil:
    """Translate the chain at head. Returns: POP_CHAIN or POP_BAD_RING. Bound: vq.size."""
    cdef uint32_t seen = 0
    cdef uint16_t at = head
    cdef virtq_desc desc
    chain_clear(chain)
    while True:
        if seen >= vq.size:
            return virtqueue_bad(vq, FAULT_CHAIN_LONG, head)
        seen += 1
        load_once_16(&desc, &vq.desc[at])
        if desc.flags & VIRTQ_DESC_F_INDIRECT:
            if not vq.indirect:
                return virtqueue_bad(vq, FAULT_INDIRECT_OFF, at)
            if desc.flags & VIRTQ_DESC_F_NEXT:
                return virtqueue_bad(vq, FAULT_INDIRECT_NESTED, at)
            return walk_indirect(vq, table, &desc, seen - 1, chain)
        if chain_add(vq, table, chain, desc.addr, desc.len, desc.flags) != POP_CHAIN:
            return POP_BAD_RING
        if not desc.flags & VIRTQ_DESC_F_NEXT:
            return POP_CHAIN
        at = desc.next
        if at >= vq.size:
            return virtqueue_bad(vq, FAULT_NEXT_RANGE, at)
