"""A split virtqueue from the driver's side, with block requests laid out for speed.

Context: one thread owns a queue: a load generator's loop, or the caller of a door.
Never: allocates, blocks, raises, or trusts what the device wrote.

Every slot owns one descriptor chain (header, data, status) that is formatted once and
re-formatted only when direction or length change, so a running load writes no
descriptors at all. Headers lie side by side, and so do statuses: a batch of requests
moves a few cache lines to the device and back, not two for each request. Chains begin
at multiples of a power of two, so a head tells its slot by a shift.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.unistd cimport write

from drivebay.memory.platform cimport (
    fence_seq_cst, load_acquire_u16, load_relaxed_u16, store_release_u16,
)
from drivebay.wire.virtio_blk cimport virtio_blk_req_header
from drivebay.wire.virtio_ring cimport (
    VIRTQ_USED_F_NO_NOTIFY, virtq_avail, virtq_desc, virtq_used,
)

cdef enum:
    STATUS_NOT_WRITTEN = 0xFF    # every status byte is preset to it
    SLOT_BAD = 0xFFFF            # the device gave back what it does not hold
    SHAPE_NONE = 0xFFFFFFFF      # the chain was never formatted

cdef struct driver_queue_t:
    virtq_desc* desc
    virtq_avail* avail
    virtq_used* used
    uint16_t* used_event         # behind avail.ring: when we want to be called
    uint16_t* avail_event        # behind used.ring: when the device wants to be kicked
    virtio_blk_req_header* headers
    uint8_t* statuses
    uint8_t* data
    uint64_t guest_offset        # guest address = host address + guest_offset, modulo 2^64
    uint32_t data_stride         # bytes between the data areas of two slots
    uint32_t slot_bytes          # longest request: what a chain has descriptors for
    uint32_t segment_bytes       # longest data descriptor
    uint16_t mask                # ring size - 1
    uint16_t slots
    uint16_t chain_shift         # head = slot << chain_shift
    uint16_t next_avail          # next entry we fill; free-running
    uint16_t published           # what the device sees as avail.idx
    uint16_t next_used           # next entry we take; free-running
    bint event_idx               # VIRTIO_F_EVENT_IDX negotiated
    int kick_fd
    uint64_t kicks
    uint32_t* shapes             # per slot: length << 1 | device reads the data
    uint8_t* inflight            # per slot

# Format a slot's chain anew. Bound: descriptors of a chain.
cdef void driver_queue_shape(driver_queue_t* q, uint16_t slot, uint32_t shape) noexcept nogil

cdef inline uint8_t* driver_queue_data(driver_queue_t* q, uint16_t slot) noexcept nogil:
    """Where the slot's data lies."""
    return q.data + <uint64_t> slot * q.data_stride

cdef inline void driver_queue_put(
    driver_queue_t* q, uint16_t slot, uint32_t kind, uint64_t sector, uint32_t length
) noexcept nogil:
    """Make a request ready; the device sees it at the next publish.

    virtio 1.3 §5.2.6: all request types whose data the device reads are odd numbers.
    """
    cdef uint32_t shape = length << 1 | (kind & 1)
    cdef uint16_t head = slot << q.chain_shift
    cdef uint16_t* entry = &q.avail.ring[q.next_avail & q.mask]
    q.headers[slot].type = kind
    q.headers[slot].sector = sector
    q.statuses[slot] = STATUS_NOT_WRITTEN
    if q.shapes[slot] != shape:
        driver_queue_shape(q, slot, shape)
    # Slots recycled in order meet the same entry again: not writing it keeps the
    # device's copy of the cache line valid.
    if entry[0] != head:
        entry[0] = head
    q.inflight[slot] = 1
    q.next_avail += 1

cdef inline bint driver_queue_wants_kick(driver_queue_t* q, uint16_t old) noexcept nogil:
    """virtio 1.3 §2.7.10: does the device ask to hear of what came since ``old``?"""
    cdef uint16_t event
    if q.event_idx:
        event = load_relaxed_u16(q.avail_event)
        return <uint16_t> (q.next_avail - event - 1) < <uint16_t> (q.next_avail - old)
    return not load_relaxed_u16(&q.used.flags) & VIRTQ_USED_F_NO_NOTIFY

cdef inline void driver_queue_publish(driver_queue_t* q) noexcept nogil:
    """Show all that was put, with one store, and kick once if the device asks for it."""
    cdef uint16_t old = q.published
    cdef uint64_t one = 1
    if q.next_avail == old:
        return
    store_release_u16(&q.avail.idx, q.next_avail)
    q.published = q.next_avail
    fence_seq_cst()              # virtio 1.3 §2.7.13.4.1: idx before looking at the flags
    if driver_queue_wants_kick(q, old):
        q.kicks += 1
        write(q.kick_fd, &one, 8)

cdef inline uint16_t driver_queue_ready(driver_queue_t* q) noexcept nogil:
    """How many used elements wait for us, by the device's word: at most the ring size is sane."""
    return load_acquire_u16(&q.used.idx) - q.next_used

cdef inline uint16_t driver_queue_take(driver_queue_t* q) noexcept nogil:
    """Take one used element, which must be ready; returns its slot, or SLOT_BAD."""
    cdef uint32_t head = q.used.ring[q.next_used & q.mask].id
    cdef uint32_t slot = head >> q.chain_shift
    if slot >= q.slots or slot << q.chain_shift != head or not q.inflight[slot]:
        return SLOT_BAD
    q.inflight[slot] = 0
    q.next_used += 1
    return <uint16_t> slot

cdef class DriverQueue:
    cdef driver_queue_t queue
    cdef unsigned char[::1] memory       # keeps the mapping alive
