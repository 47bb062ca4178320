"""Virtqueues, split and packed: layouts and numbers of virtio 1.3 §2.7 and §2.8, and of the
inflight region of vhost-user. No behaviour."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "drivebay/wire/layout.h" nogil:
    cdef struct virtq_desc:
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next
    cdef struct virtq_avail:
        uint16_t flags
        uint16_t idx
        uint16_t* ring
    cdef struct virtq_used_elem:
        uint32_t id
        uint32_t len
    cdef struct virtq_used:
        uint16_t flags
        uint16_t idx
        virtq_used_elem* ring
    cdef struct virtq_packed_desc:
        uint64_t addr
        uint32_t len
        uint16_t id
        uint16_t flags
    cdef struct virtq_packed_event:
        uint16_t off_wrap
        uint16_t flags
    cdef struct virtq_inflight_split_entry:
        uint8_t inflight
        uint16_t next
        uint64_t counter
    cdef struct virtq_inflight_split:
        uint64_t features
        uint16_t version
        uint16_t desc_num
        uint16_t last_batch_head
        uint16_t used_idx
        virtq_inflight_split_entry* desc
    cdef struct virtq_inflight_packed_entry:
        uint8_t inflight
        uint16_t next
        uint16_t last
        uint16_t num
        uint64_t counter
        uint16_t id
        uint16_t flags
        uint32_t len
        uint64_t addr
    cdef struct virtq_inflight_packed:
        uint64_t features
        uint16_t version
        uint16_t desc_num
        uint16_t free_head
        uint16_t old_free_head
        uint16_t used_idx
        uint16_t old_used_idx
        uint8_t used_wrap_counter
        uint8_t old_used_wrap_counter
        virtq_inflight_packed_entry* desc

# virtio 1.3 §2.7.5: descriptor flags.
cdef enum:
    VIRTQ_DESC_F_NEXT = 1
    VIRTQ_DESC_F_WRITE = 2
    VIRTQ_DESC_F_INDIRECT = 4

# virtio 1.3 §2.8.1: which lap of the ring a packed descriptor was made available or used in.
cdef enum:
    VIRTQ_PACKED_DESC_F_AVAIL = 1 << 7
    VIRTQ_PACKED_DESC_F_USED = 1 << 15

# virtio 1.3 §2.8.10: virtq_packed_event.flags; the wrap counter is bit 15 of off_wrap.
cdef enum:
    VIRTQ_EVENT_F_ENABLE = 0
    VIRTQ_EVENT_F_DISABLE = 1
    VIRTQ_EVENT_F_DESC = 2
    VIRTQ_EVENT_WRAP = 1 << 15

# virtio 1.3 §2.7.6 and §2.7.8: advice on notifications, without EVENT_IDX.
cdef enum:
    VIRTQ_AVAIL_F_NO_INTERRUPT = 1
    VIRTQ_USED_F_NO_NOTIFY = 1

# virtio 1.3 §6: feature bits of the ring and the transport, by number.
cdef enum:
    VIRTIO_RING_F_INDIRECT_DESC = 28
    VIRTIO_RING_F_EVENT_IDX = 29
    VIRTIO_F_VERSION_1 = 32
    VIRTIO_F_RING_PACKED = 34

# The longest ring served here (the specification allows 32,768).
cdef enum:
    VIRTQ_MAX_SIZE = 1024
