"""The delay bdev: what its base has done is answered later, as on a slower disk.

An I/O is held behind its base, not before it: the base's own time then comes on top as on
a real disk, and its data is as safe as its answer says at any moment. Four lists a channel,
one a class of latency; in each, deadlines rise, since a class has one latency. When control
lowers it, newcomers wait behind those who came with the higher one: order is kept.
One timer a channel, for the earliest deadline; none while nothing waits.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport (
    CHANNEL_REMOVED, FRAME_DONE, FRAME_TAKEN, IO_READ, IO_WRITE, SUBMIT_DONE, SUBMIT_PENDING, Bdev,
    Channel, channel_t, io_complete, io_push, io_t)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.filter cimport FilterBdev
from drivebay.memory.platform cimport load_relaxed_u64, store_relaxed_u64, tsc_read
from drivebay.reactor.io cimport io_list_append, io_list_take
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport reactor_timer_cancel, reactor_timer_set
from drivebay.reactor.timer cimport timer_t

from drivebay.errors import UsageError

LATENCIES = ("avg_read", "p99_read", "avg_write", "p99_write")  # in the order of the classes
MOST_US = 24 * 3600 * 1_000_000

cdef enum:
    LOT = 100


cdef inline uint64_t next_random(delay_t* delay) noexcept nogil:
    """xorshift64."""
    delay.random ^= delay.random << 13
    delay.random ^= delay.random >> 7
    delay.random ^= delay.random << 17
    return delay.random


cdef int class_of(delay_t* delay, const io_t* io) noexcept nogil:
    """AVG_ or P99_, so that exactly one of each hundred is slow, whatever the guest's rhythm."""
    cdef bint writes = io.operation == IO_WRITE
    cdef lot_t* lot = &delay.lots[1 if writes else 0]
    cdef bint is_slow
    if lot.position == 0:
        lot.slow = <uint32_t>(next_random(delay) % LOT)
    is_slow = lot.position == lot.slow
    lot.position = 0 if lot.position == LOT - 1 else lot.position + 1
    if writes:
        return P99_WRITE if is_slow else AVG_WRITE
    return P99_READ if is_slow else AVG_READ


cdef uint64_t ticks_of(const channel_t* channel, uint64_t us) noexcept nogil:
    return us * (channel.reactor.ticks_a_second // 1000) // 1000


cdef void arm(channel_t* channel) noexcept nogil:
    """Set the timer to the earliest deadline."""
    cdef delay_t* delay = <delay_t*>channel.module
    cdef uint64_t earliest = <uint64_t>-1
    cdef int i
    for i in range(DELAYS):
        if delay.waiting[i].first != NULL:
            earliest = min(earliest, delay.waiting[i].first.engine)
    if earliest == <uint64_t>-1:
        reactor_timer_cancel(channel.reactor, &delay.timer)
    elif not delay.timer.pending or delay.timer.deadline != earliest:
        reactor_timer_set(channel.reactor, &delay.timer, earliest)


cdef bint hold(channel_t* channel, io_t* io) noexcept nogil:
    """Let a completed I/O wait for its time. Returns: does it have to?"""
    cdef delay_t* delay = <delay_t*>channel.module
    cdef int which
    cdef uint64_t latency
    if channel.flags & CHANNEL_REMOVED:
        return False
    which = class_of(delay, io)
    latency = ticks_of(channel, load_relaxed_u64(&delay.latencies_us[which]))
    if latency == 0 and delay.waiting[which].first == NULL:
        return False
    io.engine = channel.reactor.now + latency
    io_list_append(&delay.waiting[which], io)
    if delay.waiting[which].first == io:
        arm(channel)
    return True


cdef int base_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    return FRAME_TAKEN if hold(<channel_t*>context, io) else FRAME_DONE


cdef int delay_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef delay_t* delay = <delay_t*>channel.module
    cdef int how
    if io.operation != IO_READ and io.operation != IO_WRITE:
        return bdev_submit(delay.base, io)
    io_push(io, base_done, channel, 0)
    how = bdev_submit(delay.base, io)
    if how != SUBMIT_DONE:
        return how
    io.frame_count -= 1
    return SUBMIT_PENDING if hold(channel, io) else SUBMIT_DONE


cdef void release(channel_t* channel, uint64_t now) noexcept nogil:
    """Complete what is due. Bound: what waits, and what comes meanwhile without latency."""
    cdef delay_t* delay = <delay_t*>channel.module
    cdef int i
    for i in range(DELAYS):
        while delay.waiting[i].first != NULL and delay.waiting[i].first.engine <= now:
            io_complete(io_list_take(&delay.waiting[i]))
    arm(channel)


cdef void due(timer_t* timer, void* context) noexcept nogil:
    cdef channel_t* channel = <channel_t*>context
    release(channel, channel.reactor.now)


cdef void act_release(message_t* message, void* reactor) noexcept nogil:
    release(<channel_t*>message.target, <uint64_t>-1)
    message_answer(message, 0)


cdef class DelayChannel(Channel):
    def __init__(self, DelayBdev bdev, reactor, Channel base):
        Channel.__init__(self, bdev, reactor)
        self.delay.base = &base.raw
        self.delay.latencies_us = bdev.latencies_us
        self.delay.timer.fn = due
        self.delay.timer.context = &self.raw
        self.delay.random = tsc_read() | 1
        self.raw.submit = delay_submit
        self.raw.module = &self.delay

    # Those who wait end at once: their data has been moved, only the answer is late.

    def remove(self):
        answer = Channel.remove(self)
        self.ask(act_release)
        return answer

    def close(self):
        answer = Channel.close(self)
        self.ask(act_release)
        return answer


cdef class DelayBdev(FilterBdev):
    product_name = "delay"
    module = "delay"

    def __init__(self, str name, uuid, Bdev base, latencies):
        FilterBdev.__init__(self, name, uuid, base)
        self.stand_on([base], own_frames=1)
        for which in LATENCIES:
            self.set_latency(which, latencies[which])

    @property
    def latencies(self):
        return {which: self.latencies_us[i] for i, which in enumerate(LATENCIES)}

    def set_latency(self, which, latency_us):
        if not 0 <= latency_us <= MOST_US:
            raise UsageError(
                f"a latency of {latency_us} us is more than the {MOST_US} us of a day",
                field="latency_us")
        store_relaxed_u64(&self.latencies_us[LATENCIES.index(which)], latency_us)

    def open_channel(self, reactor, *bases):
        return DelayChannel(self, reactor, bases[0])

    def driver_specific(self):
        return {"delay": {
            "name": self.name, "base_bdev_name": self.bases[0].name, "uuid": str(self.uuid),
            **{f"{which}_latency": us for which, us in self.latencies.items()}}}
