"""The heap of deadlines: see timer.pxd for who may use it and what it costs."""

from libc.stdint cimport uint64_t


cdef timer_t* meld(timer_t* one, timer_t* other) noexcept nogil:
    """Two heaps become one; of equal deadlines the first stays on top."""
    cdef timer_t* swap
    if other == NULL:
        return one
    if one == NULL:
        return other
    if other.deadline < one.deadline:
        swap = one
        one = other
        other = swap
    other.previous = one
    other.next = one.child
    if one.child != NULL:
        one.child.previous = other
    one.child = other
    return one


cdef timer_t* meld_siblings(timer_t* first) noexcept nogil:
    """Pairs from the left, then all from the right: what keeps the heap shallow.

    Bound: the number of siblings, each once in either direction.
    """
    cdef timer_t* pairs = NULL
    cdef timer_t* pair
    cdef timer_t* second
    cdef timer_t* following
    while first != NULL:
        second = first.next
        following = NULL if second == NULL else second.next
        first.next = NULL
        if second != NULL:
            second.next = NULL
        pair = meld(first, second)
        pair.next = pairs
        pairs = pair
        first = following
    while pairs != NULL:
        following = pairs.next
        pairs.next = NULL
        first = meld(pairs, first)
        pairs = following
    if first != NULL:
        first.previous = NULL
    return first


cdef void timer_cancel(timers_t* timers, timer_t* timer) noexcept nogil:
    if not timer.pending:
        return
    timer.pending = False
    if timer.previous == NULL:
        timers.earliest = meld_siblings(timer.child)
        return
    if timer.previous.child == timer:
        timer.previous.child = timer.next
    else:
        timer.previous.next = timer.next
    if timer.next != NULL:
        timer.next.previous = timer.previous
    timers.earliest = meld(timers.earliest, meld_siblings(timer.child))


cdef void timer_set(timers_t* timers, timer_t* timer, uint64_t deadline) noexcept nogil:
    """Also moves one that is set already."""
    timer_cancel(timers, timer)
    timer.child = timer.next = timer.previous = NULL
    # A timer that sets itself to what is past must not be run again in the same turn.
    timer.deadline = max(deadline, timers.now + 1)
    timer.pending = True
    timers.earliest = meld(timers.earliest, timer)


cdef void timers_run(timers_t* timers, uint64_t now) noexcept nogil:
    """Call what is due, earliest first. Bound: what was due before the first call."""
    cdef timer_t* timer
    timers.now = now
    while timers_due(timers, now):
        timer = timers.earliest
        timer_cancel(timers, timer)
        timer.fn(timer, timer.context)
