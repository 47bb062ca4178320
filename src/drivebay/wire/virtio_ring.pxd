"""Split virtqueues: layouts and numbers of virtio 1.3 §2.7. No behaviour."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

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

# virtio 1.3 §2.7.5: descriptor flags.
cdef enum:
    VIRTQ_DESC_F_NEXT = 1
    VIRTQ_DESC_F_WRITE = 2
    VIRTQ_DESC_F_INDIRECT = 4

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
