"""Where the clusters of a volume lie: one number a cluster, read by every reactor.

Numbers are published with release and read with acquire. One that is not zero changes only
while control has quiesced all volumes that read it. Context: reactor, and control.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Channel, channel_t
from drivebay.memory.platform cimport load_acquire_u32

cdef enum:
    ENTRIES_A_PAGE = 512    # of an extent page
    BITS_WORDS = 8          # with a bit for each of them

# What of an extent page a power cut can't take back.
cdef struct stable_t:
    uint64_t entries[BITS_WORDS]    # a bit each, as of some write
    uint64_t written        # space.pages_written after the last write

cdef struct table_t:
    uint32_t* clusters      # of the base, in cluster sizes; 0: not allocated
    uint32_t* extent_pages  # metadata page of each 512 entries, 0: none yet; NULL: run lengths
    stable_t* stable        # of each extent page; the owner's
    uint64_t num_clusters
    uint64_t allocated
    uint64_t blob_id
    const table_t* parent   # what is read where this has nothing
    bint external           # the same, on another bdev
    channel_t* external_channel     # on the owner's reactor, to copy from; NULL: it is missing
    void* object            # the ClusterTable

# What table_find answers.
cdef enum:
    FOUND_NOTHING = 0       # it reads as zeroes
    FOUND_CLUSTER = 1
    FOUND_EXTERNAL = 2

cdef inline uint32_t table_own(const table_t* table, uint64_t index) noexcept nogil:
    """The cluster that the volume itself has there, or 0."""
    if index >= table.num_clusters:
        return 0
    return load_acquire_u32(&table.clusters[index])

cdef inline int table_find(const table_t* table, uint64_t index, uint32_t* cluster) noexcept nogil:
    """Where to read. Past the end of a parent nothing is read from its own parents.

    Bound: the length of the chain, which control keeps free of circles.
    """
    while index < table.num_clusters:
        cluster[0] = load_acquire_u32(&table.clusters[index])
        if cluster[0]:
            return FOUND_CLUSTER
        if table.parent == NULL:
            return FOUND_EXTERNAL if table.external else FOUND_NOTHING
        table = table.parent
    return FOUND_NOTHING

cdef class Numbers:
    cdef uint32_t* data
    cdef Py_ssize_t[1] shape
    cdef Py_ssize_t[1] strides

cdef class ClusterTable:
    cdef table_t raw
    cdef Numbers numbers
    cdef Numbers pages
    cdef Numbers stable
    cdef readonly ClusterTable parent
    cdef readonly Channel external_channel
    cdef void point(self) noexcept
