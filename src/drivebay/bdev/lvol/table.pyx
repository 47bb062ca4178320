"""Cluster tables as control makes and changes them: see table.pxd for who may read when."""

from cpython.buffer cimport PyBUF_FORMAT
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from drivebay.bdev.base cimport Channel
from drivebay.memory.platform cimport store_release_u32

from drivebay.errors import UsageError


cdef enum:
    STABLE_WORDS = 2 * (BITS_WORDS + 1)     # of a stable_t, in a Numbers


cdef class Numbers:
    """An array of u32 for memoryview(); zeroes that were never written cost no memory."""

    def __cinit__(self, size_t count):
        self.data = <uint32_t*>calloc(max(count, <size_t>1), sizeof(uint32_t))
        if self.data == NULL:
            raise MemoryError(f"no memory for a table of {count} clusters")
        self.shape[0] = count
        self.strides[0] = sizeof(uint32_t)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        buffer.buf = self.data
        buffer.format = NULL
        if flags & PyBUF_FORMAT:
            buffer.format = b"I"
        buffer.internal = NULL
        buffer.itemsize = sizeof(uint32_t)
        buffer.len = self.shape[0] * <Py_ssize_t>sizeof(uint32_t)
        buffer.ndim = 1
        buffer.obj = self
        buffer.readonly = 0
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL

    def __dealloc__(self):
        free(self.data)


cdef Numbers resized(Numbers old, size_t count):
    cdef Numbers new = Numbers(count)
    memcpy(new.data, old.data, min(count, <size_t>old.shape[0]) * sizeof(uint32_t))
    return new


cdef inline size_t pages_for(uint64_t num_clusters) noexcept:
    return <size_t>((num_clusters + ENTRIES_A_PAGE - 1) // ENTRIES_A_PAGE)


cdef class ClusterTable:
    def __init__(self, uint64_t num_clusters, uint64_t blob_id, *, bint extent_table=True):
        self.numbers = Numbers(num_clusters)
        self.raw.num_clusters = num_clusters
        self.raw.blob_id = blob_id
        self.raw.object = <void*>self
        if extent_table:
            self.pages = Numbers(pages_for(num_clusters))
            self.stable = Numbers(pages_for(num_clusters) * STABLE_WORDS)
        self.point()

    cdef void point(self) noexcept:
        """The path reads these arrays."""
        self.raw.clusters = self.numbers.data
        self.raw.extent_pages = NULL if self.pages is None else self.pages.data
        self.raw.stable = NULL if self.stable is None else <stable_t*>self.stable.data

    @property
    def num_clusters(self):
        return self.raw.num_clusters

    @property
    def allocated(self):
        return self.raw.allocated

    @property
    def blob_id(self):
        return self.raw.blob_id

    @property
    def external(self):
        return bool(self.raw.external)

    @property
    def clusters(self):
        return memoryview(self.numbers)

    @property
    def extent_pages(self):
        return None if self.pages is None else memoryview(self.pages)

    def get(self, uint64_t index):
        if index >= self.raw.num_clusters:
            raise IndexError(f"cluster {index} of {self.raw.num_clusters}")
        return table_own(&self.raw, index)

    def set(self, uint64_t index, uint32_t cluster):
        self.raw.allocated += <int>(cluster != 0) - <int>(self.get(index) != 0)
        store_release_u32(&self.raw.clusters[index], cluster)

    def recount(self):
        cdef uint64_t i, count = 0
        for i in range(self.raw.num_clusters):
            count += self.raw.clusters[i] != 0
        self.raw.allocated = count

    def resize(self, uint64_t num_clusters):
        self.numbers = resized(self.numbers, num_clusters)
        self.raw.num_clusters = num_clusters
        if self.pages is not None:
            self.pages = resized(self.pages, pages_for(num_clusters))
            self.stable = resized(self.stable, pages_for(num_clusters) * STABLE_WORDS)
        self.point()
        self.recount()

    def swap(self, ClusterTable other):
        if (self.pages is None) != (other.pages is None):
            raise UsageError("a table of run lengths cannot change places with one of pages")
        self.numbers, other.numbers = other.numbers, self.numbers
        self.pages, other.pages = other.pages, self.pages
        self.stable, other.stable = other.stable, self.stable
        self.raw.num_clusters, other.raw.num_clusters = (
            other.raw.num_clusters, self.raw.num_clusters)
        self.raw.allocated, other.raw.allocated = other.raw.allocated, self.raw.allocated
        self.point()
        other.point()

    def set_parent(self, ClusterTable parent):
        self.raw.external = False
        self.raw.external_channel = NULL
        self.external_channel = None
        self.raw.parent = NULL if parent is None else &parent.raw
        self.parent = parent

    def set_external(self, Channel channel, *, bint present=True):
        self.set_parent(None)
        self.raw.external = present
        self.raw.external_channel = NULL if channel is None else &channel.raw
        self.external_channel = channel
