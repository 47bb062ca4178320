"""The reactor's class, and for those who serve on it the loop's names (reactor/loop.pxd)."""

from libc.stdint cimport uint64_t

from drivebay.reactor.loop cimport (
    SOURCE_HOT, engine_t, reactor_add_engine, reactor_attach, reactor_detach, reactor_mark_dirty,
    reactor_notify, reactor_rewatch, reactor_t, reactor_timer_cancel, reactor_timer_set,
    reactor_wake, source_t)
from drivebay.reactor.mailbox cimport Answer, ControlMailbox, act_fn

cdef class Reactor:
    cdef reactor_t raw
    cdef readonly ControlMailbox control
    cdef readonly int core
    cdef readonly dict shared       # engines that all channels on this reactor use
    cdef int poll_us
    cdef int tid
    cdef object thread
    cdef bint stepping
    cdef void* block_memory
    cdef void set_rate(self, uint64_t ticks) noexcept
    cdef int allocate_blocks(self) except -1
    cdef Answer ask(
        self, act_fn act, void* target, object keep,
        uint64_t a=*, uint64_t b=*, uint64_t c=*, uint64_t d=*)
