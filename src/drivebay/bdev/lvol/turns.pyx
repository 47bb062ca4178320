"""Once a turn: see turns.pxd. Context: reactor, except the class."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from drivebay.bdev.base cimport SUBMIT_DONE, SUBMIT_PENDING, io_complete, io_t
from drivebay.reactor.io cimport io_list_append, io_list_take, io_locate
from drivebay.reactor.reactor cimport engine_t, reactor_t

cdef enum:
    PIECE_BYTES = 1048576   # cleared at once; the other guests wait meanwhile


cdef void turn_due(turns_t* turns, turn_t* turn) noexcept nogil:
    """Run it when the queues have been served, or in the next turn if they have been."""
    if turn.listed:
        return
    turn.listed = True
    turn.next = turns.due
    turns.due = turn
    turns.engine.unflushed += 1


cdef void turn_forget(turns_t* turns, turn_t* turn) noexcept nogil:
    """Before its end. Bound: those that are due."""
    cdef turn_t** link = &turns.due
    while turn.listed and link[0] != NULL:
        if link[0] == turn:
            link[0] = turn.next
            turn.listed = False
            return
        link = &link[0].next


cdef void run_due(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Bound: those that were due at the call."""
    cdef turns_t* turns = <turns_t*>engine
    cdef turn_t* turn = turns.due
    cdef turn_t* following
    turns.due = NULL
    engine.unflushed = 0
    while turn != NULL:
        following = turn.next
        turn.listed = False
        turn.run(turn)
        turn = following


cdef bint clear_piece(io_t* io) noexcept nogil:
    """Clear the next piece of the buffers. Returns: are all cleared?"""
    cdef uint64_t left = min(<uint64_t>PIECE_BYTES, io.length - io.done), skip = 0, part
    cdef uint32_t i = io_locate(io, &skip)
    while left:
        part = min(<uint64_t>io.iov[i].iov_len - skip, left)
        memset(<uint8_t*>io.iov[i].iov_base + skip, 0, part)
        io.done += part
        left -= part
        skip = 0
        i += 1
    return io.done == io.length


cdef int clear_buffers(turns_t* turns, io_t* io) noexcept nogil:
    """Answer a read of what was never written."""
    io.done = 0
    io.status = 0
    if io.length <= PIECE_BYTES:
        clear_piece(io)
        return SUBMIT_DONE
    io_list_append(&turns.clearing, io)
    turns.engine.inflight += 1
    return SUBMIT_PENDING


cdef int clear_next(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """One piece of the oldest; then it is the next one's turn."""
    cdef turns_t* turns = <turns_t*>engine
    cdef io_t* io = io_list_take(&turns.clearing)
    if clear_piece(io):
        engine.inflight -= 1
        io_complete(io)
    else:
        io_list_append(&turns.clearing, io)
    return 1


cdef class Turns(TurnEngine):
    def __init__(self):
        self.serve(&self.raw.engine, clear_next, run_due)
