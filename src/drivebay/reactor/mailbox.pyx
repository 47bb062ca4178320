"""Mailboxes: the only way between the control plane and the reactors.

Posting runs in any thread; taking in the owner's. Nothing here waits.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.unistd cimport close, read, write

from drivebay.memory.guest_memory cimport drop_broken_doorbell, report_broken, set_broken_doorbell
from drivebay.memory.platform cimport (
    compare_exchange_ptr, exchange_ptr, exchange_u32, fence_seq_cst, fetch_or_u32, load_acquire_ptr,
    store_release_u32, store_release_u64, tsc_read,
)

import asyncio

from drivebay.errors import HostError, StateError

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)


cdef int mailbox_open(mailbox_t* box) except -1:
    box.messages = NULL
    box.events = NULL
    box.asleep = 0
    box.doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if box.doorbell < 0:
        raise HostError("cannot make an eventfd", errno)
    return 0


cdef void mailbox_close(mailbox_t* box) noexcept:
    if box.doorbell >= 0:
        close(box.doorbell)
    box.doorbell = -1


cdef void mailbox_ring(mailbox_t* box) noexcept nogil:
    cdef uint64_t one = 1
    # pairs with [A] in reactor_sleep: the post is visible before asleep is read
    fence_seq_cst()
    if exchange_u32(&box.asleep, 0):
        box.rung_on = sched_getcpu()
        store_release_u64(&box.rung, tsc_read())
        write(box.doorbell, &one, sizeof(one))


cdef void mailbox_post(mailbox_t* box, message_t* message) noexcept nogil:
    """Bound: retried only while other posters win."""
    while True:
        message.next = <message_t*>load_acquire_ptr(&box.messages)
        if compare_exchange_ptr(&box.messages, message.next, message):
            break
    mailbox_ring(box)


cdef message_t* mailbox_take(mailbox_t* box) noexcept nogil:
    """All messages, oldest first. Context: the owner."""
    cdef message_t* newest
    cdef message_t* following
    cdef message_t* oldest = NULL
    if load_acquire_ptr(&box.messages) == NULL:
        return NULL
    newest = <message_t*>exchange_ptr(&box.messages, NULL)
    while newest != NULL:
        following = newest.next
        newest.next = oldest
        oldest = newest
        newest = following
    return oldest


cdef void message_answer(message_t* message, int64_t result) noexcept nogil:
    """The last time the receiver may touch the message."""
    message.result = result
    mailbox_post(message.reply_to, message)


cdef void event_raise(mailbox_t* box, event_t* event, uint32_t bits) noexcept nogil:
    fetch_or_u32(&event.bits, bits)
    if exchange_u32(&event.listed, 1):
        return
    while True:
        event.next = <event_t*>load_acquire_ptr(&box.events)
        if compare_exchange_ptr(&box.events, event.next, event):
            break
    mailbox_ring(box)


cdef class EventOwner:
    cdef int on_event(self, uint32_t bits) except -1:
        return 0


cdef class Answer:
    def result(self):
        if not self.done:
            raise StateError("the reactor has not answered yet")
        return self.raw.result

    def __await__(self):
        if not self.done:
            future = asyncio.get_running_loop().create_future()
            self.waiters.append(future)
            yield from future
        return self.raw.result

    cdef int deliver(self) except -1:
        self.done = True
        self.keep = None
        for future in self.waiters:
            if not future.done():
                future.set_result(None)
        self.waiters.clear()
        return 0


cdef Answer answered(int64_t result):
    """An answer that needed no reactor."""
    cdef Answer answer = Answer.__new__(Answer)
    answer.waiters = []
    answer.raw.result = result
    answer.done = True
    return answer


cdef class ControlMailbox:
    def __cinit__(self):
        self.box.doorbell = -1

    def __init__(self):
        mailbox_open(&self.box)
        self.box.asleep = 1
        set_broken_doorbell(self.box.doorbell)

    def __dealloc__(self):
        drop_broken_doorbell(self.box.doorbell)
        mailbox_close(&self.box)

    def fileno(self):
        return self.box.doorbell

    cdef Answer ask(
        self, mailbox_t* to, act_fn act, void* target, object keep,
        uint64_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0
    ):
        cdef Answer answer = Answer.__new__(Answer)
        answer.waiters = []
        answer.keep = keep
        answer.raw.act = act
        answer.raw.target = target
        answer.raw.argument[0] = a
        answer.raw.argument[1] = b
        answer.raw.argument[2] = c
        answer.raw.argument[3] = d
        answer.raw.reply_to = &self.box
        answer.raw.owner = <void*>answer
        Py_INCREF(answer)
        mailbox_post(to, &answer.raw)
        return answer

    def drain(self):
        cdef message_t* message
        cdef message_t* next_message
        cdef event_t* event
        cdef event_t* next_event
        cdef Answer answer
        cdef uint64_t rings = 0
        cdef int count = 0
        failure = None
        read(self.box.doorbell, &rings, sizeof(rings))
        store_release_u32(&self.box.asleep, 1)
        fence_seq_cst()
        # Answers first taken, last told: what an object raised before its final
        # answer is then in the list of events, and is told while the object lives.
        message = mailbox_take(&self.box)
        event = <event_t*>exchange_ptr(&self.box.events, NULL)
        while event != NULL:
            next_event = event.next
            exchange_u32(&event.listed, 0)
            try:
                (<EventOwner>event.owner).on_event(exchange_u32(&event.bits, 0))
            except BaseException as error:
                failure = error     # raised when the others have had theirs
            event = next_event
            count += 1
        while message != NULL:
            next_message = message.next
            answer = <Answer>message.owner
            answer.deliver()
            Py_DECREF(answer)
            message = next_message
            count += 1
        count += report_broken()
        if failure is not None:
            raise failure
        return count
