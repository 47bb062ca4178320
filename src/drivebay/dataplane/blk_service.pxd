"""One virtqueue of a virtio-blk device: from the ring to the bdev and back.

Context: reactor, one owner a queue; control reaches it by messages only (blk_queue).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.bdev.base cimport channel_t
from drivebay.dataplane.blk_request cimport disk_t
from drivebay.dataplane.coalescing cimport coalescing_t
from drivebay.dataplane.dirty_log cimport dirty_log_t
from drivebay.dataplane.inflight cimport recovered_t
from drivebay.dataplane.ring cimport chain_t, token_t, virtqueue_t
from drivebay.memory.guest_memory cimport memtable_t
from drivebay.reactor.io cimport IO_INLINE_IOVECS, io_t, iovec, iovec_block_t
from drivebay.reactor.mailbox cimport event_t, message_t
from drivebay.reactor.reactor cimport reactor_t, source_t
from drivebay.wire.virtio_blk cimport VIRTIO_BLK_ID_BYTES

cdef enum:
    SLOT_BYTES = 512        # at most; also the distance between slots

# What an event of a queue says.
cdef enum:
    EVENT_BROKEN = 1

# A request in flight. io is first: its completion finds the slot by it.
cdef struct slot_t:
    io_t io
    iovec iov[IO_INLINE_IOVECS]
    iovec_block_t* block    # borrowed for more buffers than fit inline
    slot_t* next
    uint8_t* status_byte
    const memtable_t* table     # it was translated with
    uint32_t written        # used length if it succeeds
    token_t token

cdef struct blk_queue_t:
    source_t source         # first: the reactor knows only this
    virtqueue_t vq
    channel_t* channel
    reactor_t* reactor
    const memtable_t* table
    chain_t* chain          # scratch of the poll
    slot_t* free            # last in, first out: the warmest one
    disk_t disk
    uint8_t enabled
    uint8_t broken
    uint8_t write_through
    uint8_t log_rings       # mark the ring's own areas too
    uint16_t again_left     # chains of an earlier target that are not submitted again yet
    const recovered_t* again    # the next of those
    dirty_log_t log
    int32_t call            # eventfd, or -1
    int32_t err             # eventfd for a broken ring, or -1
    uint32_t old_inflight   # of those, translated with an older table
    uint8_t gather_rest
    uint8_t gather_pause
    coalescing_t coalescing
    message_t* stopping     # answered when nothing is left to do
    message_t* switching    # those answered when old_inflight is 0
    event_t event
    uint64_t requests
    uint64_t notifications
    uint64_t bad_requests
    uint8_t serial[VIRTIO_BLK_ID_BYTES]

# What the reactor calls of a source.
cdef int blk_queue_poll(source_t* source, reactor_t* reactor) noexcept nogil
cdef bint blk_queue_arm(source_t* source) noexcept nogil
cdef void blk_queue_disarm(source_t* source) noexcept nogil
cdef void blk_queue_publish(source_t* source, reactor_t* reactor) noexcept nogil

cdef void blk_queue_call(blk_queue_t* q) noexcept nogil
cdef void blk_queue_break(blk_queue_t* q) noexcept nogil
cdef bint blk_queue_is_drained(const blk_queue_t* q) noexcept nogil
cdef void blk_queue_end(blk_queue_t* q) noexcept nogil
