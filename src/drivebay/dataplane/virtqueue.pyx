"""Walking a descriptor chain of a split virtqueue. Context: reactor, but for the sentences.

Every descriptor is copied once and checked as copied, so that a driver which
changes it meanwhile harms nobody. Deviation: a chain may be as long as the ring,
indirect tables included; the specification allows it no more (virtio 1.3
§2.7.5.3.1), and that bound is what ends a looping chain.
"""

from libc.stdint cimport UINT64_MAX, uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.memory.guest_memory cimport memtable_read, memtable_resolve, memtable_t
from drivebay.memory.platform cimport load_once_16
from drivebay.reactor.io cimport BLOCK_IOVECS
from drivebay.wire.virtio_ring cimport (
    VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, virtq_desc,
)


cdef int add_buffer(
    virtqueue_t* vq, const memtable_t* table, chain_t* chain, const virtq_desc* desc
) noexcept nogil:
    """Translate one descriptor; it may span regions. Bound: BLOCK_IOVECS."""
    cdef uint64_t address = desc.addr, left = desc.len, part
    cdef uint32_t at
    cdef uint8_t* host
    cdef bint writable = desc.flags & VIRTQ_DESC_F_WRITE
    if not writable and chain.writable:
        return virtqueue_bad(vq, FAULT_ORDER, desc.flags)
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
        if add_buffer(vq, table, chain, &desc) != POP_CHAIN:
            return POP_BAD_RING
        if not desc.flags & VIRTQ_DESC_F_NEXT:
            return POP_CHAIN
        at = desc.next
        if at >= count:
            return virtqueue_bad(vq, FAULT_NEXT_RANGE, at)


cdef int virtqueue_walk(
    virtqueue_t* vq, const memtable_t* table, uint16_t head, chain_t* chain
) noexcept nogil:
    """Translate the chain at head. Returns: POP_CHAIN or POP_BAD_RING. Bound: vq.size."""
    cdef uint32_t seen = 0
    cdef uint16_t at = head
    cdef virtq_desc desc
    chain.readable = 0
    chain.writable = 0
    chain.readable_bytes = 0
    chain.writable_bytes = 0
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
        if add_buffer(vq, table, chain, &desc) != POP_CHAIN:
            return POP_BAD_RING
        if not desc.flags & VIRTQ_DESC_F_NEXT:
            return POP_CHAIN
        at = desc.next
        if at >= vq.size:
            return virtqueue_bad(vq, FAULT_NEXT_RANGE, at)


FAULTS = {
    FAULT_AVAIL_JUMP: "avail.idx jumped to {}, further than the ring is long",
    FAULT_HEAD_RANGE: "the avail ring names descriptor {}, which the ring does not have",
    FAULT_HEAD_TWICE: "descriptor {} was made available again while in flight",
    FAULT_NEXT_RANGE: "a descriptor's next is {}, which its table does not have",
    FAULT_CHAIN_LONG: "the chain at {} is longer than the ring, or loops",
    FAULT_ADDRESS: "a buffer in guest page {:#x} is outside the memory table",
    FAULT_INDIRECT_LENGTH: "an indirect table of {} bytes is no list that fits the ring",
    FAULT_INDIRECT_NESTED: "descriptor {} nests or continues an indirect table",
    FAULT_INDIRECT_OFF: "descriptor {} is indirect, which was not negotiated",
    FAULT_ORDER: "a readable buffer follows a writable one (flags {:#x})",
    FAULT_CALL_BLOCKED: "its call eventfd was made to block (value {})",
    FAULT_WATCH: "its kick eventfd cannot be watched (errno {})",
}


cdef str fault_sentence(uint8_t fault, uint32_t value):
    """What control logs of a ring that was given up. Context: control."""
    return FAULTS[fault].format(value)
