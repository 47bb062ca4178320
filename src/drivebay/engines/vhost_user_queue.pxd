"""A virtqueue from the driver's side, split or packed, with block requests laid out for speed.

Context: one thread owns a queue: a load generator's loop, or the caller of a door.
Never: allocates, blocks, raises, or trusts what the device wrote.

Every slot owns one descriptor chain (header, data, status) that is formatted once and
re-formatted only when direction or length change, so a running load writes no chains at
all. In a split ring the chains are the descriptor table, and begin at multiples of a power
of two, so a head tells its slot by a shift. In a packed ring they lie beside the ring: an
entry points to its chain (indirect), or takes a copy of it; its id is the slot. Headers
lie side by side, and so do statuses: a batch of requests moves a few cache lines to the
device and back, not two for each request.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport write

from drivebay.memory.platform cimport (
    fence_seq_cst, load_acquire_u16, load_relaxed_u16, load_relaxed_u32, store_release_u16,
    store_release_u32,
)
from drivebay.wire.virtio_blk cimport virtio_blk_req_header
from drivebay.wire.virtio_ring cimport (
    VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_INDIRECT, VIRTQ_EVENT_F_DESC, VIRTQ_EVENT_F_DISABLE,
    VIRTQ_EVENT_F_ENABLE, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED,
    VIRTQ_USED_F_NO_NOTIFY, virtq_avail, virtq_desc, virtq_packed_desc, virtq_packed_event,
    virtq_used,
)

cdef enum:
    STATUS_NOT_WRITTEN = 0xFF    # every status byte is preset to it
    SLOT_BAD = 0xFFFF            # the device gave back what it does not hold
    SHAPE_NONE = 0xFFFFFFFF      # the chain was never formatted
    LAP_BITS = VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED

cdef struct driver_queue_t:
    bint packed
    bint indirect                # packed only: entries point to their chains
    bint event_idx               # VIRTIO_F_EVENT_IDX negotiated
    # Split
    virtq_desc* desc
    virtq_avail* avail
    virtq_used* used
    uint16_t* used_event         # behind avail.ring: when we want to be called
    uint16_t* avail_event        # behind used.ring: when the device wants to be kicked
    uint16_t mask                # ring size - 1
    uint16_t published           # what the device sees as avail.idx
    # Packed
    virtq_packed_desc* ring
    virtq_packed_desc* chains
    virtq_packed_event* driver_event
    virtq_packed_event* device_event
    uint16_t avail_lap           # the bits that make a descriptor available in this lap
    uint16_t used_lap            # the bits that a used one has in this lap
    uint16_t put                 # descriptors that the device does not see yet
    uint16_t first               # where they begin
    uint16_t first_flags         # stored last: what is behind it is out of reach until then
    # Both
    uint16_t next_avail          # next entry we fill; free-running, packed: below the ring's size
    uint16_t next_used           # next entry we take; the same
    uint16_t size
    uint16_t slots
    uint16_t chain_shift         # chain = slot << chain_shift
    virtio_blk_req_header* headers
    uint8_t* statuses
    uint8_t* data
    uint64_t guest_offset        # guest address = host address + guest_offset, modulo 2^64
    uint32_t data_stride         # bytes between the data areas of two slots
    uint32_t slot_bytes          # longest request: what a chain has descriptors for
    uint32_t segment_bytes       # longest data descriptor
    int kick_fd
    int call_fd
    uint64_t kicks
    uint32_t* shapes             # per slot: length << 1 | device reads the data
    uint16_t* lengths            # per slot: descriptors of its chain
    uint16_t* inflight           # per slot: ring entries that it takes now, 0 = it is free

# Format a slot's chain anew. Bound: descriptors of a chain.
cdef void driver_queue_shape(driver_queue_t* q, uint16_t slot, uint32_t shape) noexcept nogil

cdef inline uint8_t* driver_queue_data(driver_queue_t* q, uint16_t slot) noexcept nogil:
    """Where the slot's data lies."""
    return q.data + <uint64_t> slot * q.data_stride

cdef inline uint16_t packed_advance(driver_queue_t* q, uint16_t at, uint16_t* lap) noexcept nogil:
    """virtio 1.3 §2.8.1: the wrap counter changes as the ring's end is passed."""
    if at + 1 < q.size:
        return <uint16_t> (at + 1)
    lap[0] ^= LAP_BITS
    return 0

cdef inline void packed_put(driver_queue_t* q, uint16_t slot) noexcept nogil:
    """Write a slot's entries behind the last ones; those of a first chain stay out of sight."""
    cdef virtq_packed_desc* chain = q.chains + (<uint32_t> slot << q.chain_shift)
    cdef virtq_packed_desc* head = &q.ring[q.next_avail]
    cdef uint16_t at = q.next_avail, lap = q.avail_lap, count = 1, flags
    head.id = slot
    if q.indirect:
        head.addr = <uintptr_t> chain + q.guest_offset
        head.len = q.lengths[slot] * <uint32_t> sizeof(virtq_packed_desc)
        flags = VIRTQ_DESC_F_INDIRECT | lap
    else:
        head.addr = chain.addr
        head.len = chain.len
        flags = chain.flags | lap
        while count < q.lengths[slot]:
            at = packed_advance(q, at, &q.avail_lap)
            q.ring[at].addr = chain[count].addr
            q.ring[at].len = chain[count].len
            q.ring[at].id = slot
            q.ring[at].flags = chain[count].flags | q.avail_lap
            count += 1
    q.inflight[slot] = count
    if q.put == 0:
        q.first = q.next_avail
        q.first_flags = flags
    else:
        store_release_u16(&head.flags, flags)
    q.put += count
    q.next_avail = packed_advance(q, at, &q.avail_lap)

cdef inline void split_put(driver_queue_t* q, uint16_t slot) noexcept nogil:
    cdef uint16_t head = slot << q.chain_shift
    cdef uint16_t* entry = &q.avail.ring[q.next_avail & q.mask]
    # Slots recycled in order meet the same entry again: not writing it keeps the
    # device's copy of the cache line valid.
    if entry[0] != head:
        entry[0] = head
    q.inflight[slot] = 1
    q.next_avail += 1

cdef inline void driver_queue_put(
    driver_queue_t* q, uint16_t slot, uint32_t kind, uint64_t sector, uint32_t length
) noexcept nogil:
    """Make a request ready; the device sees it at the next publish.

    virtio 1.3 §5.2.6: all request types whose data the device reads are odd numbers.
    """
    cdef uint32_t shape = length << 1 | (kind & 1)
    q.headers[slot].type = kind
    q.headers[slot].sector = sector
    q.statuses[slot] = STATUS_NOT_WRITTEN
    if q.shapes[slot] != shape:
        driver_queue_shape(q, slot, shape)
    if q.packed:
        packed_put(q, slot)
    else:
        split_put(q, slot)

cdef inline bint split_wants_kick(driver_queue_t* q, uint16_t old) noexcept nogil:
    """virtio 1.3 §2.7.10: does the device ask to hear of what came since ``old``?"""
    cdef uint16_t event
    if q.event_idx:
        event = load_relaxed_u16(q.avail_event)
        return <uint16_t> (q.next_avail - event - 1) < <uint16_t> (q.next_avail - old)
    return not load_relaxed_u16(&q.used.flags) & VIRTQ_USED_F_NO_NOTIFY

cdef inline bint packed_wants_kick(driver_queue_t* q, uint16_t added) noexcept nogil:
    """virtio 1.3 §2.8.10: does the device ask to hear of the last ``added`` descriptors?"""
    cdef uint32_t word = load_relaxed_u32(q.device_event)
    cdef uint16_t flags = word >> 16 & 3, event = word & 0x7FFF
    cdef bint event_wrap = word >> 15 & 1
    if flags != VIRTQ_EVENT_F_DESC or not q.event_idx:
        return flags != VIRTQ_EVENT_F_DISABLE
    if event_wrap != (q.avail_lap & VIRTQ_PACKED_DESC_F_AVAIL != 0):
        event -= q.size          # the device's lap is the one before
    return <uint16_t> (q.next_avail - event - 1) < added

cdef inline void driver_queue_publish(driver_queue_t* q) noexcept nogil:
    """Show all that was put, with one store, and kick once if the device asks for it."""
    cdef uint16_t added
    cdef uint64_t one = 1
    cdef bint wanted
    if q.packed:
        added = q.put
        if added == 0:
            return
        store_release_u16(&q.ring[q.first].flags, q.first_flags)
        q.put = 0
        fence_seq_cst()          # virtio 1.3 §2.8.21.3.1: flags before looking at the event
        wanted = packed_wants_kick(q, added)
    else:
        added = q.published      # index before
        if q.next_avail == added:
            return
        store_release_u16(&q.avail.idx, q.next_avail)
        q.published = q.next_avail
        fence_seq_cst()          # virtio 1.3 §2.7.13.4.1: idx before looking at the flags
        wanted = split_wants_kick(q, added)
    if wanted:
        q.kicks += 1
        write(q.kick_fd, &one, 8)

cdef inline uint16_t packed_ready(driver_queue_t* q) noexcept nogil:
    """Follow the used entries, each as far as its request is long. Bound: slots."""
    cdef uint32_t at = q.next_used
    cdef uint16_t lap = q.used_lap, found = 0, slot
    while found < q.slots:
        if (load_acquire_u16(&q.ring[at].flags) & LAP_BITS) != lap:
            break
        found += 1
        slot = q.ring[at].id
        if slot >= q.slots or q.inflight[slot] == 0:
            break                # whoever takes it will see
        at += q.inflight[slot]
        if at >= q.size:
            at -= q.size
            lap ^= LAP_BITS
    return found

cdef inline uint16_t driver_queue_ready(driver_queue_t* q) noexcept nogil:
    """How many used elements wait for us, by the device's word: at most the ring size is sane."""
    if q.packed:
        return packed_ready(q)
    return load_acquire_u16(&q.used.idx) - q.next_used

cdef inline uint32_t driver_queue_used_id(driver_queue_t* q) noexcept nogil:
    """What the device calls the next used element."""
    if q.packed:
        return q.ring[q.next_used].id
    return q.used.ring[q.next_used & q.mask].id

cdef inline uint16_t driver_queue_take(driver_queue_t* q) noexcept nogil:
    """Take one used element, which must be ready; returns its slot, or SLOT_BAD."""
    cdef uint32_t id = driver_queue_used_id(q), slot = id, next
    if not q.packed:
        slot = id >> q.chain_shift
        if slot << q.chain_shift != id:
            return SLOT_BAD
    if slot >= q.slots or q.inflight[slot] == 0:
        return SLOT_BAD
    if q.packed:
        next = q.next_used + <uint32_t> q.inflight[slot]
        if next >= q.size:
            next -= q.size
            q.used_lap ^= LAP_BITS
        q.next_used = <uint16_t> next
    else:
        q.next_used += 1
    q.inflight[slot] = 0
    return <uint16_t> slot

cdef inline void driver_queue_silence(driver_queue_t* q) noexcept nogil:
    """Tell the device that nobody waits for its calls."""
    if q.packed:
        store_release_u32(q.driver_event, <uint32_t> VIRTQ_EVENT_F_DISABLE << 16)
        return
    # With EVENT_IDX flags are ignored: an event that lies behind the present index
    # comes up once in 65,536 completions, which costs nothing.
    q.avail.flags = VIRTQ_AVAIL_F_NO_INTERRUPT
    store_release_u16(q.used_event, q.next_used - 1)

cdef inline bint driver_queue_arm(driver_queue_t* q) noexcept nogil:
    """Ask for a call at the next completion; true if one is there already."""
    cdef uint32_t word = VIRTQ_EVENT_F_ENABLE << 16
    if q.packed:
        if q.event_idx:
            word = VIRTQ_EVENT_F_DESC << 16 | q.next_used
            if q.used_lap:
                word |= 1 << 15
        store_release_u32(q.driver_event, word)
    else:
        q.avail.flags = 0
        store_release_u16(q.used_event, q.next_used)
    fence_seq_cst()
    return driver_queue_ready(q) != 0

cdef class DriverQueue:
    cdef driver_queue_t queue
    cdef unsigned char[::1] memory       # keeps the mapping alive
