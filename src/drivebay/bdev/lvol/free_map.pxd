"""Which clusters of a store are free, and which of those hold nothing but zeroes.

Context: reactor, the owner's; control while the space is frozen.
"""

from libc.stdint cimport uint8_t, uint64_t

from drivebay.bdev.lvol.table cimport Numbers

# A bit a cluster, the lowest of each byte first.
cdef struct free_map_t:
    uint8_t* used
    uint8_t* zeroed         # those known to read as zeroes
    uint64_t total
    uint64_t free
    uint64_t lowest         # no cluster below is free
    bint frozen             # control's turn
    bint unclear            # one that had to be clear was not: control clears some ahead

cdef inline bint bit_get(const uint8_t* bits, uint64_t i) noexcept nogil:
    return bits[i >> 3] >> (i & 7) & 1

cdef inline void bit_set(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] |= <uint8_t>(1 << (i & 7))

cdef inline void bit_clear(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] &= <uint8_t>~(1 << (i & 7))

cdef uint64_t free_map_take(free_map_t* map) noexcept nogil
cdef void free_map_give(free_map_t* map, uint64_t cluster) noexcept nogil

cdef class FreeMap:
    cdef free_map_t raw
    cdef Numbers used_bits
    cdef Numbers zeroed_bits
    cdef int set_bits(self, uint64_t total) except -1
    cdef int require_frozen(self) except -1
    cdef bint is_unclear(self, uint64_t cluster) noexcept
