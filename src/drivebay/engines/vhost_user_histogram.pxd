"""A latency histogram: 64 buckets in each power of two, so values are right to 1.6 %.

Context: the thread that owns it. Recording costs a bit scan and two additions.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    int __builtin_clzll(unsigned long long) noexcept nogil

cdef enum:
    SUB_BITS = 6
    SUB_BUCKETS = 1 << SUB_BITS
    VALUE_BITS = 44                      # an hour and more of ticks; larger values are cut
    BUCKETS = (VALUE_BITS - SUB_BITS + 1) << SUB_BITS

cdef struct histogram_t:
    uint64_t sum
    uint64_t max
    uint64_t counts[BUCKETS]

cdef inline uint64_t histogram_bucket(uint64_t value) noexcept nogil:
    """Below 64 a bucket for each value; above, the six bits behind the leading one."""
    cdef int octave
    if value < SUB_BUCKETS:
        return value
    if value >> VALUE_BITS:
        value = (1ULL << VALUE_BITS) - 1
    octave = 63 - SUB_BITS - __builtin_clzll(value)
    return (<uint64_t> octave << SUB_BITS) + (value >> octave)

cdef inline void histogram_record(histogram_t* h, uint64_t value) noexcept nogil:
    h.counts[histogram_bucket(value)] += 1
    h.sum += value
    if value > h.max:
        h.max = value

cdef class Histogram:
    cdef histogram_t histogram
