"""Coalescing: a queue with many requests tells its guest of them less often.

The rate of each queue is looked at every 10 ms, when it has something to tell. Above the
threshold a notification is due no earlier than delay = base * (n - threshold) / threshold
after the one before; what is told sooner waits for a timer, so that the last completion
of a burst is never kept for longer. Off while base is 0. Context: reactor.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.reactor.reactor cimport reactor_t, reactor_timer_cancel, reactor_timer_set
from drivebay.reactor.timer cimport timer_t

cdef enum:
    LOOKS_A_SECOND = 100
    COALESCING_IOPS = 60000     # the threshold that is shown while it is off

cdef struct coalescing_t:
    uint64_t base           # ticks; 0: off
    uint64_t threshold      # requests between two looks
    uint64_t delay          # ticks between notifications, now
    uint64_t next_call      # tick before which none is sent
    uint64_t looked         # tick of the last look at the rate
    uint64_t requests       # that the queue had taken then
    timer_t timer           # set: a notification is owed

cdef inline void coalescing_set(
    coalescing_t* c, reactor_t* reactor, uint64_t requests, uint64_t delay_base_us, uint32_t iops
) noexcept nogil:
    """From now on; what is owed stays so."""
    c.base = delay_base_us * reactor.ticks_a_second // 1000000
    c.threshold = iops // LOOKS_A_SECOND
    c.delay = 0
    c.next_call = 0
    c.looked = reactor.now
    c.requests = requests

cdef inline void coalescing_look(
    coalescing_t* c, const reactor_t* reactor, uint64_t requests
) noexcept nogil:
    """The requests in 10 ms, also where it is longer than that since the last look."""
    cdef uint64_t interval = reactor.ticks_a_second // LOOKS_A_SECOND
    cdef uint64_t passed = reactor.now - c.looked, count
    if passed < interval:
        return
    count = <uint64_t>(<double>(requests - c.requests) * <double>interval / <double>passed)
    c.delay = c.base * (count - c.threshold) // c.threshold if count > c.threshold else 0
    c.looked = reactor.now
    c.requests = requests

cdef inline bint coalescing_hold(
    coalescing_t* c, reactor_t* reactor, uint64_t requests
) noexcept nogil:
    """A notification is due. True: it waits for the timer; False: it is to be sent now."""
    if c.timer.pending:
        return True
    coalescing_look(c, reactor, requests)
    if reactor.now < c.next_call:
        reactor_timer_set(reactor, &c.timer, c.next_call)
        return True
    c.next_call = reactor.now + c.delay
    return False

cdef inline bint coalescing_owes(coalescing_t* c, reactor_t* reactor) noexcept nogil:
    """Before the queue stops or changes: is one owed? It is the caller's then."""
    if not c.timer.pending:
        return False
    reactor_timer_cancel(reactor, &c.timer)
    return True
