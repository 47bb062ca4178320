"""A virtqueue from the driver's side: see vhost_user_queue.pxd.

This file holds what does not run for every request: formatting of chains, set-up, and
the door through which Python submits single requests.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from drivebay.wire.virtio_ring cimport (
    VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, virtq_avail, virtq_desc, virtq_packed_desc,
    virtq_packed_event, virtq_used,
)

from drivebay.errors import PeerError, StateError, UsageError


cdef void set_descriptor(
    driver_queue_t* q, uint32_t at, uint64_t address, uint32_t length, uint16_t flags
) noexcept nogil:
    """One descriptor of a chain. virtio 1.3 §2.8.8: an indirect table's have no NEXT."""
    if q.packed:
        q.chains[at].addr = address
        q.chains[at].len = length
        q.chains[at].id = 0
        q.chains[at].flags = flags & ~VIRTQ_DESC_F_NEXT if q.indirect else flags
        return
    q.desc[at].addr = address
    q.desc[at].len = length
    q.desc[at].flags = flags
    q.desc[at].next = <uint16_t> (at + 1) if flags & VIRTQ_DESC_F_NEXT else 0


cdef void driver_queue_shape(driver_queue_t* q, uint16_t slot, uint32_t shape) noexcept nogil:
    cdef uint32_t head = <uint32_t> slot << q.chain_shift, at = head
    cdef uint32_t left = shape >> 1, length
    cdef uint16_t direction = 0 if shape & 1 else VIRTQ_DESC_F_WRITE
    cdef uint64_t address = <uintptr_t> driver_queue_data(q, slot) + q.guest_offset
    set_descriptor(
        q, at, <uintptr_t> &q.headers[slot] + q.guest_offset, sizeof(virtio_blk_req_header),
        VIRTQ_DESC_F_NEXT)
    while left:
        at += 1
        length = left if left < q.segment_bytes else q.segment_bytes
        set_descriptor(q, at, address, length, VIRTQ_DESC_F_NEXT | direction)
        address += length
        left -= length
    at += 1
    set_descriptor(
        q, at, <uintptr_t> &q.statuses[slot] + q.guest_offset, 1, VIRTQ_DESC_F_WRITE)
    q.lengths[slot] = <uint16_t> (at - head + 1)
    q.shapes[slot] = shape


cdef class DriverQueue:
    def __cinit__(self, memory, layout, guest_base, event_idx, int kick_fd, int call_fd):
        cdef unsigned char[::1] view = memory
        cdef uint8_t* base = &view[0]
        cdef driver_queue_t* q = &self.queue
        memset(q, 0, sizeof(driver_queue_t))
        if layout.end > view.shape[0]:
            raise UsageError(
                f"the queue's layout ends at byte {layout.end} of {view.shape[0]} bytes of memory")
        self.memory = view
        q.packed = layout.packed
        q.indirect = layout.indirect
        if q.packed:
            q.ring = <virtq_packed_desc*> (base + <uint64_t> layout.desc)
            q.driver_event = <virtq_packed_event*> (base + <uint64_t> layout.avail)
            q.device_event = <virtq_packed_event*> (base + <uint64_t> layout.used)
            q.chains = <virtq_packed_desc*> (base + <uint64_t> layout.chains)
            q.avail_lap = VIRTQ_PACKED_DESC_F_AVAIL
            q.used_lap = LAP_BITS
        else:
            q.desc = <virtq_desc*> (base + <uint64_t> layout.desc)
            q.avail = <virtq_avail*> (base + <uint64_t> layout.avail)
            q.used = <virtq_used*> (base + <uint64_t> layout.used)
            q.used_event = &q.avail.ring[<uint32_t> layout.size]
            q.avail_event = <uint16_t*> &q.used.ring[<uint32_t> layout.size]
        q.headers = <virtio_blk_req_header*> (base + <uint64_t> layout.headers)
        q.statuses = base + <uint64_t> layout.statuses
        q.data = base + <uint64_t> layout.data
        q.guest_offset = <uint64_t> guest_base - <uintptr_t> base
        q.data_stride = layout.data_stride
        q.slot_bytes = layout.slot_bytes
        q.segment_bytes = layout.segment_bytes
        q.size = layout.size
        q.mask = layout.size - 1
        q.slots = layout.slots
        q.chain_shift = layout.chain_shift
        q.event_idx = event_idx
        q.kick_fd = kick_fd
        q.call_fd = call_fd
        q.shapes = <uint32_t*> calloc(q.slots, sizeof(uint32_t))
        q.lengths = <uint16_t*> calloc(q.slots, sizeof(uint16_t))
        q.inflight = <uint16_t*> calloc(q.slots, sizeof(uint16_t))
        if q.shapes == NULL or q.lengths == NULL or q.inflight == NULL:
            raise MemoryError
        memset(q.shapes, 0xFF, q.slots * sizeof(uint32_t))    # SHAPE_NONE
        driver_queue_silence(q)

    def __dealloc__(self):
        free(self.queue.shapes)
        free(self.queue.lengths)
        free(self.queue.inflight)

    @property
    def slots(self):
        return self.queue.slots

    @property
    def kicks(self):
        return self.queue.kicks

    def silence(self):
        driver_queue_silence(&self.queue)

    def arm(self):
        return driver_queue_arm(&self.queue)

    def put(self, int slot, unsigned int kind, unsigned long long sector, unsigned int length):
        if not 0 <= slot < self.queue.slots:
            raise UsageError(f"slot {slot} of a queue with {self.queue.slots}")
        if self.queue.inflight[slot]:
            raise StateError(f"slot {slot} is in flight")
        if length > self.queue.slot_bytes:
            raise UsageError(
                f"{length} bytes do not fit a slot of {self.queue.slot_bytes}", field="length")
        driver_queue_put(&self.queue, <uint16_t> slot, kind, sector, length)

    def publish(self):
        driver_queue_publish(&self.queue)

    def take(self):
        cdef driver_queue_t* q = &self.queue
        cdef uint32_t used_length
        cdef uint16_t slot
        if driver_queue_ready(q) == 0:
            return None
        if q.packed:
            used_length = q.ring[q.next_used].len
        else:
            used_length = q.used.ring[q.next_used & q.mask].len
        slot = driver_queue_take(q)
        if slot == SLOT_BAD:
            raise PeerError(
                "the target gave back a descriptor chain that it does not hold: id "
                f"{driver_queue_used_id(q)}")
        return slot, q.statuses[slot], used_length

    def data(self, int slot):
        if not 0 <= slot < self.queue.slots:
            raise UsageError(f"slot {slot} of a queue with {self.queue.slots}")
        start = driver_queue_data(&self.queue, <uint16_t> slot) - &self.memory[0]
        return memoryview(self.memory)[start:start + self.queue.slot_bytes]
