"""The block device: layouts and numbers of virtio 1.3 §5.2. No behaviour."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "drivebay/wire/layout.h" nogil:
    cdef struct virtio_blk_req_header:
        uint32_t type
        uint32_t reserved
        uint64_t sector
    cdef struct virtio_blk_discard_segment:
        uint64_t sector
        uint32_t num_sectors
        uint32_t flags

# §5.2.6: request types.
cdef enum:
    VIRTIO_BLK_T_IN = 0
    VIRTIO_BLK_T_OUT = 1
    VIRTIO_BLK_T_FLUSH = 4
    VIRTIO_BLK_T_GET_ID = 8
    VIRTIO_BLK_T_DISCARD = 11
    VIRTIO_BLK_T_WRITE_ZEROES = 13

# §5.2.6: statuses, one byte.
cdef enum:
    VIRTIO_BLK_S_OK = 0
    VIRTIO_BLK_S_IOERR = 1
    VIRTIO_BLK_S_UNSUPP = 2

# §5.2.6: flags of a discard or write-zeroes segment.
cdef enum:
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

# §5.2.3: feature bits, by number.
cdef enum:
    VIRTIO_BLK_F_SIZE_MAX = 1
    VIRTIO_BLK_F_SEG_MAX = 2
    VIRTIO_BLK_F_RO = 5
    VIRTIO_BLK_F_BLK_SIZE = 6
    VIRTIO_BLK_F_FLUSH = 9
    VIRTIO_BLK_F_TOPOLOGY = 10
    VIRTIO_BLK_F_CONFIG_WCE = 11
    VIRTIO_BLK_F_MQ = 12
    VIRTIO_BLK_F_DISCARD = 13
    VIRTIO_BLK_F_WRITE_ZEROES = 14

cdef enum:
    VIRTIO_BLK_ID_BYTES = 20
    VIRTIO_BLK_SECTOR_BYTES = 512
