"""From buffers to a checked request. Context: reactor; touches only the chain's memory."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from drivebay.dataplane.ring cimport chain_t
from drivebay.reactor.io cimport (
    IO_FLUSH, IO_MAY_UNMAP, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, iovec,
)
from drivebay.wire.virtio_blk cimport (
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_SECTOR_BYTES,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    virtio_blk_discard_segment, virtio_blk_req_header,
)

cdef uint64_t LAST_SECTOR = (<uint64_t>1 << 55) - 1     # a sector times 512 stays below 2^64


cdef void take(iovec** iov, uint32_t* count, uint8_t* into, uint64_t length) noexcept nogil:
    """Copy the first bytes of a list of iovecs and cut them off it; they are there."""
    cdef uint64_t part
    while length:
        part = min(<uint64_t>iov[0][0].iov_len, length)
        memcpy(into, iov[0][0].iov_base, part)
        into += part
        length -= part
        iov[0][0].iov_base = <uint8_t*>iov[0][0].iov_base + part
        iov[0][0].iov_len -= part
        if iov[0][0].iov_len == 0:
            iov[0] += 1
            count[0] -= 1


cdef int answer(request_t* request, uint8_t status) noexcept nogil:
    request.status = status
    return PARSE_ANSWER


cdef int parse_transfer(request_t* request, uint64_t sector) noexcept nogil:
    if request.length == 0 or request.length % VIRTIO_BLK_SECTOR_BYTES:
        return answer(request, VIRTIO_BLK_S_UNSUPP)
    if sector > LAST_SECTOR:
        return answer(request, VIRTIO_BLK_S_IOERR)
    request.offset = sector * VIRTIO_BLK_SECTOR_BYTES
    return PARSE_SUBMIT


cdef int parse_range(request_t* request, bint discard) noexcept nogil:
    """DISCARD and WRITE_ZEROES: one segment, as the configuration says."""
    cdef virtio_blk_discard_segment segment
    if request.length != sizeof(segment):
        return answer(request, VIRTIO_BLK_S_IOERR)
    take(&request.iov, &request.iov_count, <uint8_t*>&segment, sizeof(segment))
    # virtio 1.3 §5.2.6.2: an unknown flag, or unmap in a discard, is unsupported.
    if segment.flags & ~<uint32_t>VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP or (discard and segment.flags):
        return answer(request, VIRTIO_BLK_S_UNSUPP)
    if segment.sector > LAST_SECTOR:
        return answer(request, VIRTIO_BLK_S_IOERR)
    if segment.num_sectors == 0:
        return answer(request, VIRTIO_BLK_S_OK)
    if segment.flags:
        request.flags = IO_MAY_UNMAP
    request.iov_count = 0
    request.offset = segment.sector * VIRTIO_BLK_SECTOR_BYTES
    request.length = <uint64_t>segment.num_sectors * VIRTIO_BLK_SECTOR_BYTES
    return PARSE_SUBMIT


cdef int dispatch(
    chain_t* chain, const disk_t* disk, request_t* request, const virtio_blk_req_header* header
) noexcept nogil:
    if header.type == VIRTIO_BLK_T_IN:
        request.operation = IO_READ
        request.iov += chain.readable
        request.iov_count = chain.writable
        request.length = chain.writable_bytes
        return parse_transfer(request, header.sector)
    if header.type == VIRTIO_BLK_T_GET_ID:
        request.iov += chain.readable
        request.iov_count = chain.writable
        request.length = chain.writable_bytes
        return PARSE_ID if request.length else answer(request, VIRTIO_BLK_S_UNSUPP)
    if header.type == VIRTIO_BLK_T_FLUSH:
        request.operation = IO_FLUSH
        request.iov_count = 0
        request.length = 0
        return PARSE_SUBMIT
    if header.type not in (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
        return answer(request, VIRTIO_BLK_S_UNSUPP)
    # virtio 1.3 §5.2.6.2: a read-only device fails these and writes nothing.
    if disk.readonly:
        return answer(request, VIRTIO_BLK_S_IOERR)
    if header.type == VIRTIO_BLK_T_OUT:
        request.operation = IO_WRITE
        return parse_transfer(request, header.sector)
    request.operation = IO_UNMAP if header.type == VIRTIO_BLK_T_DISCARD else IO_WRITE_ZEROES
    return parse_range(request, header.type == VIRTIO_BLK_T_DISCARD)


cdef int blk_request_parse(chain_t* chain, const disk_t* disk, request_t* request) noexcept nogil:
    """Fill request from chain, whose iovecs it cuts to the data. Returns: PARSE_*."""
    cdef virtio_blk_req_header header
    cdef iovec* last
    if chain.readable_bytes < sizeof(header) or chain.writable_bytes == 0:
        return PARSE_BAD
    last = &chain.iov[chain.readable + chain.writable - 1]
    last.iov_len -= 1
    request.status_byte = <uint8_t*>last.iov_base + last.iov_len
    chain.writable_bytes -= 1
    if last.iov_len == 0:
        chain.writable -= 1
    request.iov = chain.iov
    take(&request.iov, &chain.readable, <uint8_t*>&header, sizeof(header))
    request.iov_count = chain.readable
    request.length = chain.readable_bytes - sizeof(header)
    request.offset = 0
    request.flags = 0
    return dispatch(chain, disk, request, &header)
