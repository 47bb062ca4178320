"""Marking pages in the dirty log, and mapping the log. Context: see dirty_log.pxd.

The log is shared with a front end that we do not trust: it may shrink its file at any
time, which guest_memory's SIGBUS handler survives, and nothing in it is ever read back.
"""

from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from drivebay.memory.guest_memory cimport MemoryTable, memtable_resolve, memtable_t
from drivebay.memory.platform cimport fetch_or_u64
from drivebay.reactor.io cimport iovec

from drivebay.errors import PeerError, StateError
from drivebay.memory.guest_memory import Region

cdef enum:
    WORD_BYTES = 8
    MARK_BUFFERS = 64       # of one call of mark_buffers


cdef void dirty_log_guest(
    const dirty_log_t* log, uint64_t guest_addr, uint64_t length
) noexcept nogil:
    """One atomic operation for each 64 pages, even if all were marked: it is also the fence
    between the write and its mark. Bound: the log's words."""
    cdef uint64_t page, last, mask
    if log.words == NULL or length == 0:
        return
    page = guest_addr >> DIRTY_PAGE_BITS
    if length - 1 > UINT64_MAX - guest_addr:
        last = UINT64_MAX >> DIRTY_PAGE_BITS
    else:
        last = (guest_addr + (length - 1)) >> DIRTY_PAGE_BITS
    if page >= log.bits:
        return
    last = min(last, log.bits - 1)
    while page <= last:
        mask = UINT64_MAX << (page & 63)
        if page >> 6 == last >> 6:
            mask &= UINT64_MAX >> (63 - (last & 63))
        fetch_or_u64(&log.words[page >> 6], mask)
        page = (page | 63) + 1


cdef void dirty_log_host(
    const dirty_log_t* log, const memtable_t* table, const void* host, uint64_t length
) noexcept nogil:
    """Memory that a table shows at two guest addresses is marked at both."""
    cdef uint32_t i
    cdef uint64_t offset
    if log.words == NULL:
        return
    for i in range(table.count):
        offset = <uint64_t>host - <uint64_t>table.regions[i].host
        if offset < table.regions[i].size:
            dirty_log_guest(log, table.regions[i].guest_addr + offset,
                            min(length, table.regions[i].size - offset))


cdef void dirty_log_iovecs(
    const dirty_log_t* log, const memtable_t* table, const iovec* iov, uint64_t length
) noexcept nogil:
    cdef uint64_t part
    if log.words == NULL:
        return
    while length:
        part = min(<uint64_t>iov.iov_len, length)
        dirty_log_host(log, table, iov.iov_base, part)
        length -= part
        iov += 1


cdef class DirtyLog:
    def __init__(self, int fd, mmap_offset, size, on_broken=None):
        if size == 0:
            raise PeerError("a dirty log of 0 bytes")
        if mmap_offset % WORD_BYTES:
            raise PeerError(
                f"a dirty log at offset {mmap_offset:#x} of its file (must be a multiple of "
                f"{WORD_BYTES})")
        try:
            self.table = MemoryTable([Region(0, size, 0, mmap_offset, fd)], None, on_broken)
        except PeerError as refusal:
            raise PeerError(f"the dirty log is no usable memory: {refusal}") from refusal
        # The last word may be cut: it is aligned, so all of it is mapped, and of the bytes
        # behind the log's end no bit is ever set.
        self.raw.bits = size * 8
        self.raw.words = <uint64_t*>self.table.raw.regions[0].host

    @property
    def covers(self):
        return self.raw.bits << DIRTY_PAGE_BITS

    def mark(self, uint64_t guest_addr, uint64_t length):
        with nogil:
            dirty_log_guest(&self.raw, guest_addr, length)

    def mark_buffers(self, MemoryTable table, buffers, uint64_t length):
        cdef iovec iov[MARK_BUFFERS]
        cdef uint64_t size, there = 0
        cdef int count = 0
        for guest_addr, size in buffers:
            if count == MARK_BUFFERS:
                raise StateError(f"more than {MARK_BUFFERS} buffers")
            iov[count].iov_len = size
            iov[count].iov_base = memtable_resolve(&table.raw, guest_addr, &size)
            if iov[count].iov_base == NULL or size != iov[count].iov_len:
                raise PeerError(f"{iov[count].iov_len} bytes at guest address {guest_addr:#x} "
                                "are in no single region")
            count += 1
            there += size
        if there < length:
            raise StateError(f"{length} bytes of buffers that have {there}")
        with nogil:
            dirty_log_iovecs(&self.raw, &table.raw, iov, length)

    def release(self):
        self.raw.words = NULL
        self.raw.bits = 0
        self.table.release()
