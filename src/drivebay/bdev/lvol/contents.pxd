"""What is in a cluster before its first write: its parents' data, or zeroes.

Clusters are copied a piece at a time, some at once; what a cache could lose is flushed before
anything points to it. Context: reactor, the owner's.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport Channel, channel_t, io_t, iovec
from drivebay.bdev.lvol.table cimport table_t
from drivebay.bdev.lvol.turns cimport Turns, turn_t, turns_t
from drivebay.reactor.mailbox cimport message_t
from drivebay.reactor.reactor cimport reactor_t

# One channel's wish for one cluster of its volume, or control's. It belongs to who asks, and
# is the owner's until granted() is called at home.
cdef struct claim_t:
    message_t message       # carries it to the owner and back
    claim_t* next           # in the list that has it
    claim_t* same           # those who asked for the same cluster later
    claim_t* chain          # in the owner's hash
    void* space             # the owner's space_t
    table_t* table
    reactor_t* home
    void (*granted)(claim_t* claim) noexcept nogil
    uint64_t index          # in the table
    uint32_t cluster        # that it gets
    int32_t status          # 0: the table has it now

# Oldest first.
cdef struct claims_t:
    claim_t* first
    claim_t* last

cdef inline void claims_append(claims_t* claims, claim_t* claim) noexcept nogil:
    claim.next = NULL
    if claims.first == NULL:
        claims.first = claim
    else:
        claims.last.next = claim
    claims.last = claim

cdef inline claim_t* claims_take(claims_t* claims) noexcept nogil:
    """The oldest, or NULL."""
    cdef claim_t* claim = claims.first
    if claim != NULL:
        claims.first = claim.next
    return claim

cdef enum:
    COPIERS = 8
    COPY_BYTES = 131072

cdef struct copier_t:
    io_t io
    iovec part
    uint8_t* buffer
    copier_t* next
    contents_t* contents
    claim_t* claim
    channel_t* source       # NULL: zeroes
    uint64_t source_offset  # of the cluster's first byte
    uint64_t source_end     # zeroes follow
    uint64_t done
    bint writing

cdef struct contents_t:
    channel_t* base
    turns_t* turns
    turn_t turn
    uint64_t cluster_bytes
    bint cached             # a completed write may be lost until a flush
    void (*made)(contents_t* contents, claim_t* claim) noexcept nogil    # claim.status says how
    claims_t waiting        # for a copier
    claims_t unflushed
    claims_t flushing
    io_t flush
    bint flush_answered     # at once, so it is looked at in the next turn
    copier_t* free
    copier_t* answered      # the same
    copier_t copiers[COPIERS]

cdef void contents_make(contents_t* contents, claim_t* claim, bint zeroed) noexcept nogil

cdef class Contents:
    cdef contents_t raw
    cdef Channel base
    cdef Turns turns
    cdef void* memory
