"""A virtio-blk request out of a chain (virtio 1.3 §5.2.6). Pure: no I/O, no state.

The framing of header, data and status is the driver's choice: the header is the
first 16 readable bytes, the status the last writable one. Context: reactor.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.dataplane.ring cimport chain_t
from drivebay.reactor.io cimport iovec

cdef enum:
    PARSE_SUBMIT = 0        # operation, offset, length and iov are set
    PARSE_ANSWER = 1        # status is set, nothing to do
    PARSE_ID = 2            # the identity goes into iov
    PARSE_BAD = 3           # no header or no place for a status

# What the disk is to a request: set once a queue.
cdef struct disk_t:
    uint8_t readonly

cdef struct request_t:
    uint8_t* status_byte
    iovec* iov              # into the chain
    uint32_t iov_count
    uint8_t operation       # IO_*
    uint8_t flags
    uint8_t status          # VIRTIO_BLK_S_*
    uint64_t offset         # bytes
    uint64_t length         # bytes

cdef int blk_request_parse(chain_t* chain, const disk_t* disk, request_t* request) noexcept nogil
