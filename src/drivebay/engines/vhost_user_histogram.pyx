"""A latency histogram: see vhost_user_histogram.pxd. This file: reading it from Python."""

from libc.string cimport memset


cdef uint64_t bucket_top(uint64_t bucket) noexcept nogil:
    """The largest value that the bucket holds."""
    cdef uint64_t octave
    if bucket < 2 * SUB_BUCKETS:
        return bucket
    octave = (bucket >> SUB_BITS) - 1
    return (((bucket & (SUB_BUCKETS - 1)) + SUB_BUCKETS + 1) << octave) - 1


cdef class Histogram:
    def __cinit__(self):
        memset(&self.histogram, 0, sizeof(histogram_t))

    def record(self, value):
        histogram_record(&self.histogram, value)

    def add(self, Histogram other not None):
        cdef int bucket
        for bucket in range(BUCKETS):
            self.histogram.counts[bucket] += other.histogram.counts[bucket]
        self.histogram.sum += other.histogram.sum
        self.histogram.max = max(self.histogram.max, other.histogram.max)

    @property
    def count(self):
        cdef uint64_t total = 0
        cdef int bucket
        for bucket in range(BUCKETS):
            total += self.histogram.counts[bucket]
        return total

    @property
    def max(self):
        return self.histogram.max

    @property
    def mean(self):
        count = self.count
        return self.histogram.sum / <double> count if count else 0.0

    def percentile(self, double percent):
        cdef uint64_t seen = 0, wanted
        cdef int bucket
        count = self.count
        if count == 0:
            return 0
        wanted = max(1, <uint64_t> (count * percent / 100.0 + 0.5))
        for bucket in range(BUCKETS):
            seen += self.histogram.counts[bucket]
            if seen >= wanted:
                return min(bucket_top(bucket), self.histogram.max)
        return self.histogram.max
