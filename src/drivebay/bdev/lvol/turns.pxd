"""What the lvol module does once in each turn of a reactor: allocations that came in since the
last one, together; and a piece of each long clearing of buffers. Context: reactor.
"""

from drivebay.bdev.base cimport io_t
from drivebay.reactor.io cimport io_list_t
from drivebay.reactor.reactor cimport engine_t
from drivebay.reactor.turn_engine cimport TurnEngine

# Something that is due in this turn or the next.
cdef struct turn_t:
    turn_t* next
    void (*run)(turn_t* turn) noexcept nogil
    bint listed

cdef struct turns_t:
    engine_t engine         # first: the reactor knows only this
    turn_t* due
    io_list_t clearing      # reads of nothing, that go on a piece in each turn

cdef void turn_due(turns_t* turns, turn_t* turn) noexcept nogil
cdef void turn_forget(turns_t* turns, turn_t* turn) noexcept nogil
cdef int clear_buffers(turns_t* turns, io_t* io) noexcept nogil

cdef class Turns(TurnEngine):
    cdef turns_t raw
