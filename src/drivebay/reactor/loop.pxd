"""The loop: one reactor per core. It knows sources (queues) and engines only by
the functions they bring, so that it imports neither.

Context: all functions here run on the reactor's own thread.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from drivebay.reactor.io cimport iovec_block_t
from drivebay.reactor.mailbox cimport mailbox_t
from drivebay.reactor.pacing cimport pacing_t
from drivebay.reactor.timer cimport timer_cancel, timer_set, timer_t, timers_t

cdef enum:
    SOURCE_DETACHED = 0
    SOURCE_HOT = 1          # polled; notifications off
    SOURCE_ARMED = 2        # notifications on, its kick is in epoll

# A queue as the reactor sees it; the queue embeds it as its first member.
cdef struct source_t:
    source_t* previous
    source_t* next
    source_t* next_dirty
    # serve once; returns the work done
    int (*poll)(source_t* source, reactor_t* reactor) noexcept nogil
    # notifications on; True: work is there
    bint (*arm)(source_t* source) noexcept nogil
    void (*disarm)(source_t* source) noexcept nogil
    void (*publish)(source_t* source, reactor_t* reactor) noexcept nogil
    uint64_t last_work      # tick
    uint64_t polls
    uint64_t busy_polls     # those that found work
    uint64_t busy           # ticks of them, and of engines for it
    uint32_t inflight       # requests whose completion will bring the next ones
    int kick                # eventfd, or -1: never armed
    uint8_t state
    uint8_t dirty           # has completions that are not published yet

# How bytes reach a device.
cdef struct engine_t:
    # what was prepared, in one call
    void (*flush)(engine_t* engine, reactor_t* reactor) noexcept nogil
    # reap; returns the work done
    int (*poll)(engine_t* engine, reactor_t* reactor) noexcept nogil
    # descriptor on or off; True: work is there
    bint (*arm)(engine_t* engine, bint armed) noexcept nogil
    int fd                  # readable when armed and completions wait; -1: none
    uint32_t unflushed
    uint32_t inflight
    uint8_t watched         # its descriptor wakes the reactor

cdef enum:
    REACTOR_MAX_ENGINES = 16

# Blocks for chains of many buffers; address space only, until used.
cdef enum:
    REACTOR_BLOCKS = 256

cdef enum:
    PLACE_SETUP = 0
    PLACE_MESSAGES = 1
    PLACE_QUEUES = 2
    PLACE_ENGINES = 3
    PLACE_NOTIFY = 4
    PLACE_SLEEP = 5

cdef struct reactor_t:
    uint64_t now            # tick of this turn
    uint64_t counted        # tick up to which time was given to a source
    timers_t timers
    pacing_t pacing
    source_t* hot           # first and last, in the order of serving
    source_t* hot_last
    source_t* dirty
    source_t* served        # the last one that had work in this turn
    uint32_t dirty_count
    uint32_t hot_count
    uint32_t armed_count
    uint32_t engine_count
    uint32_t stopping
    uint8_t running         # on its own thread: now follows the clock
    int epoll
    uint8_t place
    int32_t notifying       # the call eventfd being written, or -1
    uint32_t rescued        # control freed the write to this descriptor, plus one
    uint64_t last_work
    uint64_t next_look      # tick at which epoll is looked at next
    uint64_t look_every
    uint64_t ticks_a_second
    uint64_t busy
    uint64_t idle
    uint64_t loops
    iovec_block_t* blocks   # free ones
    uint8_t blocks_short    # a source that was just polled asked for one more than there are
    mailbox_t mailbox
    mailbox_t* control
    engine_t* engines[REACTOR_MAX_ENGINES]

cdef int reactor_attach(reactor_t* reactor, source_t* source) noexcept nogil    # 0 or -errno
cdef void reactor_wake(reactor_t* reactor, source_t* source) noexcept nogil
cdef void reactor_detach(reactor_t* reactor, source_t* source) noexcept nogil
cdef int reactor_rewatch(reactor_t* reactor, source_t* source, int kick) noexcept nogil
cdef void reactor_add_engine(reactor_t* reactor, engine_t* engine) noexcept nogil
cdef void reactor_notify(reactor_t* reactor, int call) noexcept nogil
cdef int reactor_turn(reactor_t* reactor) noexcept nogil
cdef void reactor_look(reactor_t* reactor, bint wait) noexcept nogil
cdef bint reactor_may_sleep(reactor_t* reactor) noexcept nogil
cdef void reactor_run(reactor_t* reactor) noexcept nogil

cdef inline void reactor_mark_dirty(reactor_t* reactor, source_t* source) noexcept nogil:
    if not source.dirty:
        source.dirty = 1
        source.next_dirty = reactor.dirty
        reactor.dirty = source
        reactor.dirty_count += 1

cdef inline void reactor_timer_set(
    reactor_t* reactor, timer_t* timer, uint64_t deadline
) noexcept nogil:
    """Have its fn called at this tick or soon after; one that is set already moves."""
    timer_set(&reactor.timers, timer, deadline)

cdef inline void reactor_timer_cancel(reactor_t* reactor, timer_t* timer) noexcept nogil:
    timer_cancel(&reactor.timers, timer)
