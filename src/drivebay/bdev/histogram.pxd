"""How long requests took, counted in buckets as SPDK lays them out.

Values are ticks. A range covers the values of one power of two in 1 << granularity buckets
of equal width; ranges 0 and 1 have one value a bucket. What is below the first range counts in
the first bucket, what is above the last one in the last.
Context: histogram_count on the reactor, the class in control.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from *:
    int __builtin_clzll(unsigned long long value) noexcept nogil

cdef struct histogram_t:
    uint32_t granularity
    uint32_t min_range
    uint32_t max_range
    int32_t operation       # the one that is counted; -1: all
    uint64_t* buckets

cdef inline uint32_t histogram_range(uint32_t granularity, uint64_t value) noexcept nogil:
    cdef uint32_t bits = 64 - <uint32_t>__builtin_clzll(value) if value else 0
    return bits - granularity if bits > granularity else 0

cdef inline void histogram_count(
    histogram_t* histogram, int32_t operation, uint64_t value
) noexcept nogil:
    cdef uint32_t granularity = histogram.granularity
    cdef uint64_t a_range = <uint64_t>1 << granularity, index
    cdef uint32_t found
    if histogram.operation >= 0 and histogram.operation != operation:
        return
    found = histogram_range(granularity, value)
    if found < histogram.min_range:
        index = 0
    elif found > histogram.max_range:
        index = ((histogram.max_range - histogram.min_range + 1) << granularity) - 1
    else:
        index = ((found - histogram.min_range) << granularity) + (
            (value >> (found - 1 if found else 0)) & (a_range - 1))
    histogram.buckets[index] += 1

cdef class Histogram:
    cdef histogram_t raw
    cdef readonly object layout
    cdef uint64_t bucket_count
