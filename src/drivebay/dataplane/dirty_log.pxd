"""The dirty log of a migration: one bit for each 4 KiB page of guest memory that we wrote.

The front end reads and clears it while we set bits, from several reactors. A mark comes
after the write that it is about: a page whose mark was cleared between the two would be
copied without what was written. Source: vhost-user, "Migration". Context: reactor, except
set-up.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.memory.guest_memory cimport MemoryTable, memtable_t
from drivebay.reactor.io cimport iovec

cdef enum:
    DIRTY_PAGE_BITS = 12

cdef struct dirty_log_t:
    uint64_t* words         # NULL: nobody migrates
    uint64_t bits           # pages that it has room for

# Mark what was written; what lies behind the log's end is not marked (and not written to).
cdef void dirty_log_guest(
    const dirty_log_t* log, uint64_t guest_addr, uint64_t length) noexcept nogil
# The same by host addresses, which must lie in the table: the one with which they were
# translated. Bound: the regions of the table.
cdef void dirty_log_host(
    const dirty_log_t* log, const memtable_t* table, const void* host, uint64_t length
) noexcept nogil
# The first `length` bytes of a list of buffers, which has at least so many.
cdef void dirty_log_iovecs(
    const dirty_log_t* log, const memtable_t* table, const iovec* iov, uint64_t length
) noexcept nogil

cdef class DirtyLog:
    """DirtyLog(fd, mmap_offset, size): the log mapped; checked as guest memory is."""
    cdef dirty_log_t raw
    cdef MemoryTable table  # the mapping, with its protection against truncation
