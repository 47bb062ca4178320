"""Engines whose work is the processor's own: a piece in each turn, on behalf of all channels."""

from drivebay.reactor.loop cimport engine_t, reactor_t
from drivebay.reactor.reactor cimport Reactor

cdef class TurnEngine:
    cdef engine_t* engine
    cdef void serve(
        self, engine_t* engine, int (*poll)(engine_t*, reactor_t*) noexcept nogil,
        void (*flush)(engine_t*, reactor_t*) noexcept nogil) noexcept

cdef TurnEngine engine_of(Reactor reactor, type kind)
