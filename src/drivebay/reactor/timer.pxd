"""Deadlines of one reactor: an intrusive pairing heap, so nothing is ever allocated.

Setting costs O(1), what runs or is cancelled O(log n) amortised, and a turn without a
due timer one comparison. Context: reactor; a timer belongs to whoever embeds it, who
cancels it before the memory goes.
"""

from libc.stdint cimport uint64_t

cdef struct timer_t:
    timer_t* child          # of those that are later, the newest
    timer_t* next           # sibling
    timer_t* previous       # sibling before, or the parent of the first; NULL: the earliest
    uint64_t deadline       # tick
    # called once, when it is due; it may set or cancel any timer, also itself
    void (*fn)(timer_t* timer, void* context) noexcept nogil
    void* context
    bint pending

cdef struct timers_t:
    timer_t* earliest
    uint64_t now            # of the last run; what is set later is due later

cdef void timer_set(timers_t* timers, timer_t* timer, uint64_t deadline) noexcept nogil
cdef void timer_cancel(timers_t* timers, timer_t* timer) noexcept nogil
cdef void timers_run(timers_t* timers, uint64_t now) noexcept nogil

cdef inline bint timers_due(const timers_t* timers, uint64_t now) noexcept nogil:
    return timers.earliest != NULL and timers.earliest.deadline <= now
