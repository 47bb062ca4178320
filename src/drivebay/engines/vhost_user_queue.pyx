"""A split virtqueue from the driver's side: see vhost_user_queue.pxd.

This file holds what does not run for every request: formatting of chains, set-up, and
the door through which Python submits single requests.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from drivebay.memory.platform cimport fence_seq_cst, store_release_u16
from drivebay.wire.virtio_ring cimport (
    VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
    virtq_avail, virtq_desc, virtq_used,
)

from drivebay.errors import PeerError, StateError, UsageError


cdef void driver_queue_shape(driver_queue_t* q, uint16_t slot, uint32_t shape) noexcept nogil:
    cdef uint32_t head = <uint32_t> slot << q.chain_shift, at = head
    cdef uint32_t left = shape >> 1, length
    cdef uint16_t direction = 0 if shape & 1 else VIRTQ_DESC_F_WRITE
    cdef uint64_t address = <uintptr_t> driver_queue_data(q, slot) + q.guest_offset
    q.desc[at].addr = <uintptr_t> &q.headers[slot] + q.guest_offset
    q.desc[at].len = sizeof(virtio_blk_req_header)
    q.desc[at].flags = VIRTQ_DESC_F_NEXT
    q.desc[at].next = <uint16_t> (at + 1)
    while left:
        at += 1
        length = left if left < q.segment_bytes else q.segment_bytes
        q.desc[at].addr = address
        q.desc[at].len = length
        q.desc[at].flags = VIRTQ_DESC_F_NEXT | direction
        q.desc[at].next = <uint16_t> (at + 1)
        address += length
        left -= length
    at += 1
    q.desc[at].addr = <uintptr_t> &q.statuses[slot] + q.guest_offset
    q.desc[at].len = 1
    q.desc[at].flags = VIRTQ_DESC_F_WRITE
    q.desc[at].next = 0
    q.shapes[slot] = shape


cdef class DriverQueue:
    def __cinit__(self, memory, layout, guest_base, event_idx, int kick_fd):
        cdef unsigned char[::1] view = memory
        cdef uint8_t* base = &view[0]
        cdef driver_queue_t* q = &self.queue
        memset(q, 0, sizeof(driver_queue_t))
        if layout.end > view.shape[0]:
            raise UsageError(
                f"the queue's layout ends at byte {layout.end} of {view.shape[0]} bytes of memory")
        self.memory = view
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
        q.mask = layout.size - 1
        q.slots = layout.slots
        q.chain_shift = layout.chain_shift
        q.event_idx = event_idx
        q.kick_fd = kick_fd
        q.shapes = <uint32_t*> calloc(q.slots, sizeof(uint32_t))
        q.inflight = <uint8_t*> calloc(q.slots, 1)
        if q.shapes == NULL or q.inflight == NULL:
            raise MemoryError
        memset(q.shapes, 0xFF, q.slots * sizeof(uint32_t))    # SHAPE_NONE
        self.silence()

    def __dealloc__(self):
        free(self.queue.shapes)
        free(self.queue.inflight)

    @property
    def slots(self):
        return self.queue.slots

    @property
    def kicks(self):
        return self.queue.kicks

    def silence(self):
        # With EVENT_IDX flags are ignored: an event that lies behind the present index
        # comes up once in 65,536 completions, which costs nothing.
        self.queue.avail.flags = VIRTQ_AVAIL_F_NO_INTERRUPT
        store_release_u16(self.queue.used_event, self.queue.next_used - 1)

    def arm(self):
        self.queue.avail.flags = 0
        store_release_u16(self.queue.used_event, self.queue.next_used)
        fence_seq_cst()
        return driver_queue_ready(&self.queue) != 0

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
        cdef uint32_t used_length
        cdef uint16_t slot, ready = driver_queue_ready(&self.queue)
        if ready == 0:
            return None
        used_length = self.queue.used.ring[self.queue.next_used & self.queue.mask].len
        slot = driver_queue_take(&self.queue)
        if slot == SLOT_BAD:
            raise PeerError(
                "the target gave back a descriptor chain that it does not hold: id "
                f"{self.queue.used.ring[self.queue.next_used & self.queue.mask].id}")
        return slot, self.queue.statuses[slot], used_length

    def data(self, int slot):
        if not 0 <= slot < self.queue.slots:
            raise UsageError(f"slot {slot} of a queue with {self.queue.slots}")
        start = driver_queue_data(&self.queue, <uint16_t> slot) - &self.memory[0]
        return memoryview(self.memory)[start:start + self.queue.slot_bytes]
