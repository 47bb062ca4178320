"""Limits of a bdev: what may go now, what waits, and whose turn is next.

Each limit is one word, the tick up to which everything sent so far is paid for. An I/O may
go when that is past, and moves it on by its own price; what stayed unused is kept for a
few milliseconds. So there are no slices to fill or to miss: an I/O that costs a second is
followed by a second of silence, and the sum is right at any depth and size. The reactors of a
bdev share these words (budget_t) and move them by compare-and-swap.

Whoever may not go waits in a list of its queue (flow_t) on its channel (throttle_t), with
one timer for the channel. Turns are by virtual time: every queue has a tag, which grows by the
price of what it sent, and the lowest tag goes first, also across reactors: each channel shows the
lowest of its own, and one that is ahead keeps back while another can go.

Context: reactor. Nothing here sends anything: bdev/entry does.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.reactor.io cimport io_list_t, io_t
from drivebay.reactor.timer cimport timer_t

# What is limited, in the order of SPDK's names.
cdef enum:
    LIMIT_IOS = 0
    LIMIT_BYTES = 1
    LIMIT_READ_BYTES = 2
    LIMIT_WRITE_BYTES = 3
    LIMITS = 4

cdef enum:
    DIRECTIONS = 2          # reads, writes
    QOS_FLOWS = 64          # queues of one channel that are told apart
    QOS_SHARES = 128        # channels of one bdev that are

# What a channel shows the others: the tag of the first that waits, or that nothing does.
cdef struct share_t:
    uint64_t first[DIRECTIONS]
    uint64_t apart[6]       # a cache line each

cdef struct budget_t:
    uint64_t paid[LIMITS]
    uint64_t turn           # the highest tag served
    uint32_t share_count
    share_t shares[QOS_SHARES]

cdef struct flow_t:
    io_list_t waiting[DIRECTIONS]
    uint64_t tag

cdef struct throttle_t:
    budget_t* budget
    share_t* share
    double price[LIMITS]    # ticks a request or a byte; 0: no limit
    uint64_t burst          # ticks: what may be kept
    uint64_t slice          # those between two runs
    uint64_t grace          # those for which one that is behind may leave a limit unused
    uint64_t last_run
    uint32_t held[DIRECTIONS]
    uint32_t active_count
    timer_t timer
    uint32_t active[QOS_FLOWS]      # flows in which something waits
    flow_t flows[QOS_FLOWS]

cdef bint qos_set(throttle_t* throttle, const uint64_t* rates, uint64_t tick_rate) noexcept nogil
cdef bint qos_may_pass(throttle_t* throttle, const io_t* io, uint64_t now) noexcept nogil
cdef void qos_hold(throttle_t* throttle, io_t* io) noexcept nogil
cdef io_t* qos_next(throttle_t* throttle, uint64_t now) noexcept nogil
cdef io_t* qos_oldest(throttle_t* throttle) noexcept nogil
cdef uint64_t qos_due(const throttle_t* throttle, uint64_t now) noexcept nogil

cdef inline bint qos_waits(const throttle_t* throttle) noexcept nogil:
    return throttle.held[0] or throttle.held[1]
