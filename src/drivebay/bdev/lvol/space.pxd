"""The free space of a store, on its owner reactor: who gets which cluster, and the extent pages
that say so on disk.

A volume's first write to a cluster is a claim. The claims of one turn are served together: a
free cluster each, its content, then one write of each extent page that changes, then the
tables. A page has one write at a time; claims that come meanwhile share the next one.
While frozen nothing is in flight and control may change everything. Context: reactor, the
owner's; space_claim() any.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport Channel, channel_t, io_t, iovec
from drivebay.bdev.lvol.contents cimport Contents, claim_t, claims_t, contents_t
from drivebay.bdev.lvol.free_map cimport FreeMap, free_map_t
from drivebay.bdev.lvol.table cimport table_t
from drivebay.bdev.lvol.turns cimport turn_t, turns_t
from drivebay.reactor.mailbox cimport EventOwner, event_t, message_t
from drivebay.reactor.reactor cimport reactor_t

cdef enum:
    PAGE_WRITES = 16
    BUCKETS = 256

# event bits
cdef enum:
    SPACE_NEEDS = 1         # of control: space.wants(), or clear clusters
    SPACE_FULL = 2

cdef struct page_write_t:
    io_t io
    iovec part
    uint8_t* image
    space_t* space
    table_t* table          # NULL: not in use
    uint64_t page           # which of the table's
    claims_t claims
    bint sent
    bint answered           # at once
    bint failed             # it is kept until control has written the page again

cdef struct space_t:
    reactor_t* reactor
    channel_t* base
    contents_t* contents
    turns_t* turns
    turn_t turn
    uint64_t cluster_bytes
    uint64_t pages_offset   # of metadata page 0, in bytes
    uint64_t page_bytes
    free_map_t* free
    uint64_t pages_written  # extent pages that went to a cache so far
    uint64_t pages_stable   # what that was when a flush began that succeeded
    claims_t pending
    claims_t needing        # an extent page
    claims_t unsaved        # content made, no extent table: control saves them
    claims_t ready          # content made
    claim_t* buckets[BUCKETS]       # those that have a cluster, by table and index
    uint32_t active         # of them, those that control need not serve
    bint frozen
    bint barred             # control says: nobody gets a cluster
    uint32_t failed         # writes, of extent pages
    bint full_told
    message_t* freezer      # answered when nothing is active
    event_t event
    page_write_t writes[PAGE_WRITES]

cdef void space_claim(space_t* space, claim_t* claim) noexcept nogil

cdef class Space(EventOwner):
    cdef space_t raw
    cdef readonly Channel base
    cdef Contents contents
    cdef readonly FreeMap free
    cdef void* images
    cdef object on_need
    cdef object on_full
