"""The map of free clusters: see free_map.pxd."""

from libc.errno cimport ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from drivebay.bdev.lvol.table cimport ClusterTable, Numbers
from drivebay.memory.platform cimport load_relaxed_u64, store_relaxed_u64, store_release_u32

from drivebay.errors import HostError, InternalError, StateError

cdef extern from * nogil:
    int __builtin_ctzll(unsigned long long bits) noexcept
    int __builtin_popcountll(unsigned long long bits) noexcept


cdef uint64_t free_map_take(free_map_t* map) noexcept nogil:
    """The lowest free cluster, or the total when there is none. Bound: the used ones."""
    cdef uint64_t* words = <uint64_t*>map.used
    cdef uint64_t word = map.lowest >> 6, cluster = map.total
    cdef uint64_t end = (map.total + 63) >> 6
    while word < end and words[word] == <uint64_t>-1:
        word += 1
    if word < end:
        cluster = min((word << 6) + <uint64_t>__builtin_ctzll(~words[word]), map.total)
    map.lowest = cluster
    if cluster < map.total:
        bit_set(map.used, cluster)
        store_relaxed_u64(&map.free, map.free - 1)
    return cluster


cdef void free_map_give(free_map_t* map, uint64_t cluster) noexcept nogil:
    if cluster >= map.total or not bit_get(map.used, cluster):
        return
    bit_clear(map.used, cluster)
    bit_clear(map.zeroed, cluster)
    store_relaxed_u64(&map.free, map.free + 1)
    map.lowest = min(map.lowest, cluster)


cdef int add_to_runs(list runs, uint64_t cluster) except -1:
    """Note a cluster in a list of (first, count)."""
    cdef Py_ssize_t last = len(runs) - 1
    if last >= 0 and runs[last][0] + runs[last][1] == cluster:
        runs[last] = (runs[last][0], runs[last][1] + 1)
    else:
        runs.append((cluster, 1))
    return 0


cdef uint64_t checked_end(ClusterTable table, uint64_t first, uint64_t count) except? 0:
    if count > table.raw.num_clusters or first > table.raw.num_clusters - count:
        raise IndexError(f"{count} clusters from {first} on; it has {table.raw.num_clusters}")
    return first + count


cdef class FreeMap:
    def __init__(self, uint64_t total):
        self.raw.frozen = True
        self.set_bits(total)

    cdef int set_bits(self, uint64_t total) except -1:
        """Bitmaps of this size, with what is in the present ones."""
        cdef size_t count = (total + 63) // 64 * 2
        cdef uint64_t i
        cdef Numbers used = Numbers(count), zeroed = Numbers(count)
        if self.used_bits is not None:
            memcpy(used.data, self.used_bits.data, self.used_bits.shape[0] * 4)
            memcpy(zeroed.data, self.zeroed_bits.data, self.zeroed_bits.shape[0] * 4)
        self.used_bits = used
        self.zeroed_bits = zeroed
        self.raw.used = <uint8_t*>used.data
        self.raw.zeroed = <uint8_t*>zeroed.data
        for i in range(self.raw.total, min(total, (self.raw.total + 7) & ~<uint64_t>7)):
            bit_clear(self.raw.used, i)     # said nothing so far
            bit_clear(self.raw.zeroed, i)
        self.raw.total = total
        self.recount()
        return 0

    cdef int require_frozen(self) except -1:
        if not self.raw.frozen:
            raise InternalError("the free clusters of a store are its owner's until it is frozen")
        return 0

    @property
    def total(self):
        return self.raw.total

    @property
    def free(self):
        return load_relaxed_u64(&self.raw.free)

    def is_used(self, uint64_t cluster):
        return cluster < self.raw.total and bool(bit_get(self.raw.used, cluster))

    @property
    def used(self):
        self.require_frozen()
        return memoryview(self.used_bits).cast("B")[:(self.raw.total + 7) // 8]

    @property
    def zeroed(self):
        self.require_frozen()
        return memoryview(self.zeroed_bits).cast("B")[:(self.raw.total + 7) // 8]

    def recount(self):
        cdef uint64_t i, used = 0
        cdef uint64_t* words = <uint64_t*>self.raw.used
        self.require_frozen()
        for i in range(self.raw.total >> 6):
            used += <uint64_t>__builtin_popcountll(words[i])
        for i in range(self.raw.total & ~<uint64_t>63, self.raw.total):
            used += bit_get(self.raw.used, i)
        store_relaxed_u64(&self.raw.free, self.raw.total - used)
        self.raw.lowest = 0

    def grow(self, uint64_t total):
        self.require_frozen()
        if total < self.raw.total:
            raise StateError(f"a store of {self.raw.total} clusters does not shrink to {total}")
        self.set_bits(total)

    def allocate(self, ClusterTable table, uint64_t first, uint64_t count):
        cdef uint64_t i, missing = 0, cluster, end
        cdef list unclean = []
        self.require_frozen()
        end = checked_end(table, first, count)
        for i in range(first, end):
            missing += table.raw.clusters[i] == 0
        if missing > self.raw.free:
            raise HostError(f"{missing} clusters are needed, {self.raw.free} are free", ENOSPC)
        for i in range(first, end):
            if table.raw.clusters[i]:
                continue
            cluster = free_map_take(&self.raw)
            if not bit_get(self.raw.zeroed, cluster):
                add_to_runs(unclean, cluster)
            bit_clear(self.raw.zeroed, cluster)
            store_release_u32(&table.raw.clusters[i], <uint32_t>cluster)
        table.raw.allocated += missing
        return unclean

    def release(self, ClusterTable table, uint64_t first, uint64_t count):
        cdef uint64_t i, end
        cdef uint32_t cluster
        cdef list freed = []
        self.require_frozen()
        end = checked_end(table, first, count)
        for i in range(first, end):
            cluster = table.raw.clusters[i]
            if cluster:
                store_release_u32(&table.raw.clusters[i], 0)
                table.raw.allocated -= 1
                free_map_give(&self.raw, cluster)
                add_to_runs(freed, cluster)
        return freed

    @property
    def unclear(self):
        self.require_frozen()
        return bool(self.raw.unclear)

    def next_unclear(self, uint64_t most):
        cdef uint64_t first = self.raw.lowest, end
        self.require_frozen()
        self.raw.unclear = False
        while first < self.raw.total and not self.is_unclear(first):
            first += 1
        end = first
        while end < self.raw.total and end - first < most and self.is_unclear(end):
            end += 1
        return first, end - first

    cdef bint is_unclear(self, uint64_t cluster) noexcept:
        return not bit_get(self.raw.used, cluster) and not bit_get(self.raw.zeroed, cluster)

    def mark_zeroed(self, uint64_t cluster, uint64_t count):
        cdef uint64_t i
        self.require_frozen()
        for i in range(cluster, min(cluster + count, self.raw.total)):
            if not bit_get(self.raw.used, i):
                bit_set(self.raw.zeroed, i)
