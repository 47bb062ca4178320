"""Messages between control and reactors, and events towards control.

A message belongs to its sender until it is answered, so nothing here allocates
and no mailbox can overflow. Posting is lock-free from any thread; only the
owner of a mailbox takes from it.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

ctypedef void (*act_fn)(message_t* message, void* reactor) noexcept nogil

cdef struct message_t:
    message_t* next
    act_fn act              # what the receiver does with it
    void* target            # to what
    uint64_t argument[4]
    int64_t result
    mailbox_t* reply_to
    void* owner             # the Answer; a borrowed reference

# Sticky bits of one object: raised any number of times, told once.
cdef struct event_t:
    event_t* next
    uint32_t bits
    uint32_t listed
    void* owner             # an EventOwner; kept alive by whoever listens

cdef struct mailbox_t:
    message_t* messages     # newest first
    event_t* events
    uint32_t asleep         # the owner wants the doorbell
    int doorbell            # eventfd
    uint64_t rung           # tick of the last ring
    int rung_on             # and the core of the one who rang

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()

cdef int mailbox_open(mailbox_t* box) except -1
cdef void mailbox_close(mailbox_t* box) noexcept
cdef void mailbox_post(mailbox_t* box, message_t* message) noexcept nogil
cdef message_t* mailbox_take(mailbox_t* box) noexcept nogil
cdef void message_answer(message_t* message, int64_t result) noexcept nogil
cdef void event_raise(mailbox_t* box, event_t* event, uint32_t bits) noexcept nogil

cdef class EventOwner:
    """What event_t.owner points to. on_event runs in control, from drain()."""
    cdef int on_event(self, uint32_t bits) except -1

cdef class Answer:
    cdef message_t raw
    cdef readonly bint done
    cdef list waiters
    cdef object keep        # what must live until the answer is there
    cdef int deliver(self) except -1

cdef class ControlMailbox:
    cdef mailbox_t box
    cdef Answer ask(
        self, mailbox_t* to, act_fn act, void* target, object keep,
        uint64_t a=*, uint64_t b=*, uint64_t c=*, uint64_t d=*)

cdef Answer answered(int64_t result)
