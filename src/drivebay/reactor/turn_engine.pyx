"""An engine without a descriptor: while it has work the reactor does not sleep.

Context: control and worker threads, except the functions that the reactor calls.
"""

from drivebay.reactor.loop cimport engine_t, reactor_add_engine, reactor_t
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport Reactor


cdef void nothing_prepared(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """For one that prepares nothing: its ``flush``."""


cdef bint never_sleeps(engine_t* engine, bint armed) noexcept nogil:
    return True


cdef void act_add_engine(message_t* message, void* reactor) noexcept nogil:
    reactor_add_engine(<reactor_t*>reactor, <engine_t*>message.target)
    message_answer(message, 0)


cdef class TurnEngine:
    cdef void serve(
        self, engine_t* engine, int (*poll)(engine_t*, reactor_t*) noexcept nogil,
        void (*flush)(engine_t*, reactor_t*) noexcept nogil
    ) noexcept:
        """Say what is called. Once, in __init__; ``flush`` may be NULL."""
        self.engine = engine
        engine.poll = poll
        engine.flush = nothing_prepared if flush == NULL else flush
        engine.arm = never_sleeps
        engine.fd = -1

    def close(self):
        pass


cdef TurnEngine engine_of(Reactor reactor, type kind):
    """The reactor's engine of a kind, made and handed over for the first who asks.

    Worker threads may come here at the same time: the first engine noted is the one.
    """
    cdef TurnEngine made
    found = reactor.shared.get(kind)
    if found is None:
        made = kind()
        found = reactor.shared.setdefault(kind, made)
        if found is made:
            reactor.ask(act_add_engine, made.engine, made)
    return found
