"""The memory of a histogram, and what control makes of its counts."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drivebay.memory.platform cimport load_relaxed_u64

from typing import NamedTuple

from drivebay.errors import UsageError

GRANULARITY_MOST = 10


class Layout(NamedTuple):
    granularity: int
    min_range: int
    max_range: int
    operation: int


def layout_of(int granularity, uint64_t least, uint64_t most, int operation=-1):
    if not 0 <= granularity <= GRANULARITY_MOST:
        raise UsageError(
            f"a histogram can't have the granularity {granularity}, but 0 to {GRANULARITY_MOST}",
            field="granularity")
    if least >= most:
        raise UsageError("a histogram's min_nsec must be less than its max_nsec",
                         field="min_nsec")
    return Layout(granularity, histogram_range(granularity, least),
                  histogram_range(granularity, most - 1), operation)


cdef class Histogram:
    def __cinit__(self, layout):
        self.layout = layout
        self.raw.granularity = layout.granularity
        self.raw.min_range = layout.min_range
        self.raw.max_range = layout.max_range
        self.raw.operation = layout.operation
        self.bucket_count = (layout.max_range - layout.min_range + 1) << layout.granularity
        self.raw.buckets = <uint64_t*>calloc(self.bucket_count, sizeof(uint64_t))
        if self.raw.buckets == NULL:
            raise MemoryError("no memory for a histogram")

    def __dealloc__(self):
        free(self.raw.buckets)

    def add(self, Histogram other):
        cdef uint64_t i
        assert other.layout == self.layout
        for i in range(self.bucket_count):
            self.raw.buckets[i] += load_relaxed_u64(&other.raw.buckets[i])

    def counts(self):
        return (<char*>self.raw.buckets)[:self.bucket_count * sizeof(uint64_t)]

    def counted_up_to(self, borders):
        cdef uint64_t i, start = 0, so_far = 0
        cdef uint32_t a_range, index
        sums = [0] * len(borders)
        position = 0
        for i in range(self.bucket_count):
            while position < len(sums) and start > borders[position]:
                sums[position] = so_far
                position += 1
            so_far += self.raw.buckets[i]
            a_range = self.raw.min_range + <uint32_t>(i >> self.raw.granularity)
            index = (<uint32_t>i & ((<uint32_t>1 << self.raw.granularity) - 1)) + 1
            start = index
            if a_range:
                start = (<uint64_t>1 << (a_range + self.raw.granularity - 1)) + (
                    <uint64_t>index << (a_range - 1))
        return sums[:position] + [so_far] * (len(sums) + 1 - position)
