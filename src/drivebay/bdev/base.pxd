"""The bdev author's page: what a channel and a bdev are on the path; io_t is in
reactor/io.pxd.

A module brings a Channel whose ``submit`` starts one checked io_t and says
SUBMIT_DONE (io.status is set), or SUBMIT_PENDING, and then calls io_complete()
from its engine's poll, on the same reactor. It never completes an I/O from
within submit.

A filter changes the io_t and hands it to bdev_submit() of its base's channel, whose
answer is its own; the entry restores the offset. Whoever changes length, iov, iov_count
or operation restores them before those above see the I/O again, by a frame of its own.
A fan-out (bdev/fanout) sends children. Context: reactor, unless said otherwise.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.histogram cimport Histogram, histogram_t
from drivebay.bdev.qos cimport budget_t, throttle_t
from drivebay.reactor.io cimport (
    FRAME_DONE, FRAME_TAKEN, IO_FLUSH, IO_FUA, IO_MAY_UNMAP, IO_OPERATIONS, IO_READ, IO_UNMAP,
    IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_PENDING, SUBMIT_QUEUED, io_complete, io_list_t,
    io_push, io_t, iovec,
)
from drivebay.reactor.mailbox cimport Answer, message_t
from drivebay.reactor.reactor cimport Reactor, reactor_t

cdef struct op_stats_t:
    uint64_t ops
    uint64_t bytes
    uint64_t errors
    uint64_t ticks
    uint64_t max_ticks
    uint64_t min_ticks

# bdev_t.flags
cdef enum:
    BDEV_VOLATILE_CACHE = 1     # a completed write may be lost until a flush
    BDEV_FUA = 2                # the module honours IO_FUA on writes itself

cdef struct bdev_t:
    uint64_t size           # bytes; control may change it
    uint32_t block_size
    uint32_t operations     # bit per IO_ operation
    uint32_t flags
    uint32_t buffer_mask    # alignment of buffers minus one
    uint32_t length_mask    # the same of their lengths; only with a buffer_mask
    uint32_t frames         # that an I/O may need from here down, the entry's included
    uint32_t depth          # of the bdevs below

# channel_t.flags
cdef enum:
    CHANNEL_GATED = 1       # new I/O is held
    CHANNEL_REMOVED = 2     # new I/O fails
    CHANNEL_CLOSING = 4     # the module lets go of it when nothing is in flight
    CHANNEL_LIMITED = 8     # what is read and written passes the throttle

cdef struct channel_t:
    int (*submit)(channel_t* channel, io_t* io) noexcept nogil
    bdev_t* bdev
    reactor_t* reactor
    void* module            # the module's own
    uint32_t flags
    uint32_t inflight       # in the module, or waiting for a bounce buffer
    message_t* draining     # those answered when inflight is 0
    histogram_t* histogram  # NULL: nobody wants one
    # A short cut for a bdev that hands down an I/O with no more than another offset: the
    # base's channel, to which it goes ``shift`` bytes further, or as ``place`` sets io.offset,
    # unless that says no. ``submit`` has to do the same for the I/O that it gets.
    channel_t* through
    bint (*place)(channel_t* channel, io_t* io) noexcept nogil
    uint64_t shift
    # Optional: before the first I/O, and after the last one.
    void (*enter)(channel_t* channel) noexcept nogil
    void (*leave)(channel_t* channel) noexcept nogil
    io_list_t held          # those held back
    bounce_t* bounces       # free bounce buffers
    io_list_t unbounced     # those waiting for one
    throttle_t* throttle    # NULL: there was no limit yet
    op_stats_t stats[IO_OPERATIONS]

cdef struct bounce_t:
    bounce_t* next
    iovec* iov              # the caller's
    uint64_t offset
    uint64_t length
    uint64_t moved
    uint32_t iov_count
    iovec part              # what the module sees
    uint8_t* buffer

cdef class Bdev:
    cdef bdev_t raw
    cdef readonly str name
    cdef readonly object uuid
    cdef public list aliases
    cdef public bint readonly
    cdef readonly list bases        # what it stands on; None where one is missing
    cdef set channels
    cdef dict closed_stats
    cdef readonly object rates      # limits a second, or None
    cdef budget_t* budget
    cdef list limited_cores         # of channels that share it
    cdef readonly object layout     # of histograms, or None
    cdef public dict histogram_settings     # what to save of them
    cdef public object sampler      # of its queue depth, or None
    cdef Histogram closed_histogram
    cdef int share_of(self, int core) except -1
    cdef int stand_on(self, list bases, int own_frames=*, bint by_children=*) except -1
    cdef int stand_through(self, Bdev base) except -1
    cdef int stand(self, list bases, uint32_t frames) except -1

cdef class Channel:
    cdef channel_t raw
    cdef readonly Bdev bdev
    cdef readonly Reactor reactor
    cdef bint active
    cdef void* bounce_memory
    cdef Histogram histogram
    cdef int allocate_bounces(self) except -1
    cdef Answer ask(self, void (*act)(message_t*, void*) noexcept nogil)
