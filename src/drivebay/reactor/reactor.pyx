"""The reactor as control knows it: made, started, asked, looked at, stopped.

Context: control, except run(), which is the thread, and act_stop, which runs on it.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)
from posix.unistd cimport close

from drivebay.memory.platform cimport (
    load_acquire_u32, load_relaxed_u32, load_relaxed_u64, store_release_u32, tsc_read)
from drivebay.reactor.clock cimport ticks_per_second
from drivebay.reactor.io cimport iovec, iovec_block_t
from drivebay.reactor.loop cimport (
    PLACE_SLEEP, REACTOR_BLOCKS, reactor_look, reactor_may_sleep, reactor_run, reactor_turn)
from drivebay.reactor.mailbox cimport (
    Answer, ControlMailbox, act_fn, answered, mailbox_close, mailbox_open, message_answer,
    message_t)
from drivebay.reactor.pacing cimport pacing_nap, pacing_set
from drivebay.reactor.watch cimport EPOLL_CLOEXEC, WATCH_MAILBOX, epoll_create1, watch

import os
import signal
import threading
from typing import NamedTuple

from drivebay.errors import HostError, StateError, UsageError

cdef extern from "<poll.h>" nogil:
    short POLLOUT
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)

cdef extern from "<sys/uio.h>" nogil:
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec* parts, int count, long offset, int flags)

cdef extern from "<sys/prctl.h>" nogil:
    int PR_SET_NAME, PR_SET_TIMERSLACK
    int prctl(int option, ...)

DEF_POLL_US = 100

cdef enum:
    LOOK_EVERY_US = 20

PLACES = ("set-up", "messages", "queues", "engines", "notifying a guest", "sleep")


cdef void act_stop(message_t* message, void* context) noexcept nogil:
    cdef reactor_t* reactor = <reactor_t*>context
    reactor.stopping = 1
    message_answer(message, 0)


class ReactorStats(NamedTuple):
    core: int
    tid: int
    busy_ticks: int
    idle_ticks: int
    loops: int
    sleeping: bool
    place: str
    queues_hot: int
    queues_armed: int


cdef class Reactor:
    def __cinit__(self):
        self.raw.epoll = -1
        self.raw.mailbox.doorbell = -1
        self.raw.notifying = -1

    def __init__(self, int core, ControlMailbox control, int poll_us=DEF_POLL_US):
        if poll_us < -1:
            raise UsageError(f"poll_us is {poll_us}; it is microseconds, or -1 for ever",
                             field="poll_us")
        self.core = core
        self.control = control
        self.poll_us = poll_us
        self.shared = {}
        self.raw.control = &control.box
        self.set_rate(ticks_per_second())
        self.raw.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.raw.epoll < 0:
            raise HostError("cannot make an epoll descriptor", errno)
        self.allocate_blocks()
        mailbox_open(&self.raw.mailbox)
        watch(self.raw.epoll, self.raw.mailbox.doorbell, &self.raw.mailbox, WATCH_MAILBOX)

    cdef int allocate_blocks(self) except -1:
        cdef int i
        cdef iovec_block_t* blocks
        self.block_memory = mmap(
            NULL, REACTOR_BLOCKS * sizeof(iovec_block_t), PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
        )
        if self.block_memory == MAP_FAILED:
            self.block_memory = NULL
            raise HostError(f"no memory for reactor {self.core}", errno)
        blocks = <iovec_block_t*>self.block_memory
        for i in range(REACTOR_BLOCKS):
            blocks[i].next = self.raw.blocks
            self.raw.blocks = &blocks[i]
        return 0

    cdef void set_rate(self, uint64_t ticks) noexcept:
        self.raw.ticks_a_second = ticks
        self.raw.look_every = ticks * LOOK_EVERY_US // 1_000_000
        pacing_set(&self.raw.pacing, ticks, self.poll_us)

    cdef Answer ask(self, act_fn act, void* target, object keep,
                    uint64_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0):
        return self.control.ask(&self.raw.mailbox, act, target, keep, a, b, c, d)

    def start(self):
        if self.thread is not None or self.stepping:
            raise StateError(f"reactor {self.core} runs already")
        if self.core not in os.sched_getaffinity(0):
            raise HostError(f"cannot run a reactor on core {self.core}, which is not ours", 22)
        self.thread = threading.Thread(
            target=self.run, name=f"reactor_{self.core}", daemon=True)
        self.thread.start()

    def run(self):
        """The thread: pinned, deaf to signals that control handles, without the GIL."""
        cdef bytes name = f"reactor_{self.core}".encode()
        cdef char* c_name = name
        faults = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
        os.sched_setaffinity(0, {self.core})
        prctl(PR_SET_NAME, c_name)
        prctl(PR_SET_TIMERSLACK, 1)     # else the kernel lets timers be 50 us late
        self.tid = threading.get_native_id()
        with nogil:
            reactor_run(&self.raw)

    def stop(self):
        if self.thread is None and not self.stepping:
            self.raw.stopping = 1       # who starts it afterwards finds it ended
            return answered(0)
        return self.ask(act_stop, NULL, self)

    def join(self):
        if self.thread is not None:
            self.thread.join()

    def step(self, uint64_t now):
        if self.thread is not None:
            raise StateError(f"reactor {self.core} has a thread; step() is for those without")
        if not self.stepping:
            self.stepping = True
            self.set_rate(1_000_000_000)
        cdef int work
        with nogil:
            self.raw.now = now
            reactor_look(&self.raw, False)
            work = reactor_turn(&self.raw)
            if not work and reactor_may_sleep(&self.raw):
                pacing_nap(&self.raw.pacing)
        return work

    def rescue(self):
        """Free the reactor from a call eventfd that its other holder made blocking.

        Returns whether there was one. One that has room holds nobody up: then the thread only
        has no core, as waking a guest gives it away. Context: control, when loops stand still.
        """
        cdef int fd = <int>load_acquire_u32(<uint32_t*>&self.raw.notifying)
        cdef uint64_t count = 0
        cdef iovec part
        cdef pollfd room
        if fd < 0:
            return False
        room.fd, room.events, room.revents = fd, POLLOUT, 0
        poll(&room, 1, 0)
        if room.revents & POLLOUT:
            return False
        store_release_u32(&self.raw.rescued, <uint32_t>fd + 1)
        # Not read(2): the other holder decides whether that blocks.
        part.iov_base = &count
        part.iov_len = sizeof(count)
        preadv2(fd, &part, 1, -1, RWF_NOWAIT)
        return True

    def stats(self):
        cdef uint8_t place = self.raw.place
        cdef uint64_t idle = load_relaxed_u64(&self.raw.idle)
        if place == PLACE_SLEEP:
            idle += tsc_read() - load_relaxed_u64(&self.raw.now)
        return ReactorStats(
            self.core, self.tid, load_relaxed_u64(&self.raw.busy), idle,
            load_relaxed_u64(&self.raw.loops), place == PLACE_SLEEP, PLACES[place],
            load_relaxed_u32(&self.raw.hot_count), load_relaxed_u32(&self.raw.armed_count))

    def close(self):
        for engine in self.shared.values():
            engine.close()
        self.shared.clear()
        if self.raw.epoll >= 0:
            close(self.raw.epoll)
            self.raw.epoll = -1
        mailbox_close(&self.raw.mailbox)

    def __dealloc__(self):
        if self.block_memory != NULL:
            munmap(self.block_memory, REACTOR_BLOCKS * sizeof(iovec_block_t))
        if self.raw.epoll >= 0:
            close(self.raw.epoll)
        mailbox_close(&self.raw.mailbox)
