"""Guest memory as the path sees it: an immutable table of mapped regions.

A table never changes once it is built; a queue that gets a new one keeps the
old alive until no request translated with it is in flight. Context: any thread
may read a table, only control builds and releases them.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MEMTABLE_MAX_REGIONS = 32

cdef struct region_t:
    uint64_t guest_addr
    uint64_t size
    uint64_t user_addr
    uint8_t* host

cdef struct memtable_t:
    uint32_t generation
    uint32_t count
    region_t regions[MEMTABLE_MAX_REGIONS]

cdef inline uint8_t* memtable_resolve(
    const memtable_t* table, uint64_t guest_addr, uint64_t* length
) noexcept nogil:
    """Host address of guest_addr; cuts *length to what is contiguous. NULL: outside.

    Bound: MEMTABLE_MAX_REGIONS. Cannot overflow: regions were checked when mapped.
    """
    cdef uint32_t i
    cdef uint64_t offset
    for i in range(table.count):
        offset = guest_addr - table.regions[i].guest_addr
        if offset < table.regions[i].size:
            if length[0] > table.regions[i].size - offset:
                length[0] = table.regions[i].size - offset
            return table.regions[i].host + offset
    return NULL

cdef bint memtable_read(
    const memtable_t* table, uint64_t guest_addr, void* into, uint64_t length
) noexcept nogil

cdef class MemoryTable:
    cdef memtable_t raw
    cdef list mappings
    cdef object on_broken
    cdef bint reported
    cdef bint released
    cdef readonly tuple regions

    cdef int map_all(self, tuple regions, MemoryTable previous) except -1
    cdef void let_go(self) noexcept
    cdef uint8_t* host_of(self, uint64_t user_addr, uint64_t length, str what) except NULL

cdef void set_broken_doorbell(int fd) noexcept nogil
cdef void drop_broken_doorbell(int fd) noexcept nogil
cdef int report_broken() except -1
