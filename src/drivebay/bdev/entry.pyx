"""What every I/O passes on its way to a module, in this order: range and
capability, the quiesce gate, limits, alignment of its buffers, statistics.

Each is one flag test while it is not needed. A bdev that only changes the offset is no
module's work: the walk goes through it to its base, and all that it went through share
one frame. Context: reactor; never waits.
"""

from libc.errno cimport EINVAL, ENODEV, EOPNOTSUPP, ERANGE, EROFS
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport (
    BDEV_FUA, BDEV_VOLATILE_CACHE, CHANNEL_CLOSING, CHANNEL_GATED, CHANNEL_LIMITED,
    CHANNEL_REMOVED, FRAME_DONE, FRAME_TAKEN, IO_FLUSH, IO_FUA, IO_READ, IO_WRITE,
    IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_PENDING, SUBMIT_QUEUED, bdev_t, channel_t, io_complete,
    io_push, io_t, op_stats_t,
)
from drivebay.bdev.bounce cimport bounce_submit
from drivebay.bdev.histogram cimport histogram_count
from drivebay.bdev.qos cimport (
    qos_due, qos_hold, qos_may_pass, qos_next, qos_oldest, qos_waits, throttle_t)
from drivebay.memory.platform cimport load_relaxed_u64, unlikely
from drivebay.reactor.io cimport IO_FRAMES, frame_t, io_list_append
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport reactor_timer_cancel, reactor_timer_set
from drivebay.reactor.timer cimport timer_t

cdef enum:
    PASSING_MOST = 64       # of those that a limit held back, in one turn

# What is saved in the entry's frame below the offset, which is one of whole blocks.
cdef enum:
    STEPS_MASK = 255        # channels that the walk went through; bdev/base bounds them
    FLUSHED_ZEROES = 256    # behind zeroes, not behind a write
    OFFSET_LOW = 511

# What admit() answers besides SUBMIT_DONE and SUBMIT_QUEUED.
cdef enum:
    ADMITTED = 3


# --- before the module ---------------------------------------------------------------------

cdef inline int check(const bdev_t* bdev, const io_t* io) noexcept nogil:
    """0 or -errno: does the bdev have this operation and these blocks?"""
    cdef uint64_t size
    if unlikely(not bdev.operations & (<uint32_t>1 << io.operation)):
        return -EOPNOTSUPP if bdev.operations & (1 << IO_WRITE) else -EROFS
    if unlikely(io.operation == IO_FLUSH):
        return 0
    size = load_relaxed_u64(&bdev.size)
    if unlikely(io.offset > size or io.length > size - io.offset):
        return -ERANGE
    if unlikely((io.offset | io.length) & (bdev.block_size - 1)):
        return -EINVAL
    return 0


cdef inline bint is_misaligned(const io_t* io, const bdev_t* bdev) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t addresses = 0, lengths = 0
    if io.operation != IO_READ and io.operation != IO_WRITE:
        return False
    for i in range(io.iov_count):
        addresses |= <uint64_t>io.iov[i].iov_base
        lengths |= <uint64_t>io.iov[i].iov_len
    return (addresses & bdev.buffer_mask | lengths & bdev.length_mask) != 0


cdef int admit(channel_t* channel, io_t* io) noexcept nogil:
    """May an I/O go on at a channel with flags? Refused is SUBMIT_DONE, held SUBMIT_QUEUED."""
    cdef throttle_t* throttle = channel.throttle
    cdef uint64_t now = channel.reactor.now, due
    if channel.flags & CHANNEL_REMOVED:
        io.status = -ENODEV
        return SUBMIT_DONE
    if channel.flags & CHANNEL_GATED:
        io_list_append(&channel.held, io)
        return SUBMIT_QUEUED
    if io.operation != IO_READ and io.operation != IO_WRITE or qos_may_pass(throttle, io, now):
        return ADMITTED
    io.engine = now     # the wait for a limit is part of the latency
    qos_hold(throttle, io)
    due = qos_due(throttle, now)
    if not throttle.timer.pending or due < throttle.timer.deadline:
        reactor_timer_set(channel.reactor, &throttle.timer, due)
    return SUBMIT_QUEUED


cdef int bdev_submit(channel_t* channel, io_t* io) noexcept nogil:
    """Start an I/O. Returns: SUBMIT_DONE with io.status, or PENDING, or QUEUED."""
    cdef int how
    io.status = check(channel.bdev, io)
    if unlikely(io.status < 0):
        channel.stats[io.operation].errors += 1
        return SUBMIT_DONE
    if unlikely(channel.flags):
        how = admit(channel, io)
        if how != ADMITTED:
            return how
    return walk(channel, channel, io, io.offset & ~<uint64_t>OFFSET_LOW, channel.reactor.now)


cdef inline int walk(
    channel_t* top, channel_t* channel, io_t* io, uint64_t saved, uint64_t started
) noexcept nogil:
    """From a channel that the I/O may enter through to the one that has work with it.

    ``saved``: the offset at the top, and how many channels lie between. Bound: the depth of
    the stack.
    """
    cdef int how
    channel.inflight += 1
    while channel.through != NULL:
        if channel.place == NULL:
            io.offset += channel.shift
        elif not channel.place(channel, io):
            break
        channel = channel.through
        io.status = check(channel.bdev, io)
        if unlikely(io.status < 0):
            channel.stats[io.operation].errors += 1
            return give_up(top, io, saved, started)
        if unlikely(channel.flags):
            how = admit(channel, io)
            if how == SUBMIT_DONE:
                return give_up(top, io, saved, started)
            if how == SUBMIT_QUEUED:
                io_push(io, module_done, top, saved, started)
                return SUBMIT_QUEUED
        channel.inflight += 1
        saved += 1
    return module_start(top, channel, io, saved, started)


cdef inline int module_start(
    channel_t* top, channel_t* channel, io_t* io, uint64_t saved, uint64_t started
) noexcept nogil:
    """Straight to the module, or in pieces through a bounce buffer: it counts as one I/O."""
    cdef int how
    io.channel = channel
    io.done = 0
    io_push(io, module_done, top, saved, started)
    if unlikely(channel.bdev.buffer_mask) and is_misaligned(io, channel.bdev):
        how = bounce_submit(channel, io)
    else:
        how = channel.submit(channel, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        if module_done(io, top, saved, started) == FRAME_TAKEN:
            return SUBMIT_PENDING
    return how


cdef int walk_on(channel_t* channel, io_t* io, uint64_t started) noexcept nogil:
    """Start what was held at a channel.

    The wait is in the latency of this one and of those above, not of those below: each side
    has a frame. In a stack so high that there is no room they share the one of those above.
    """
    cdef frame_t* above
    cdef uint64_t saved = io.offset & ~<uint64_t>OFFSET_LOW
    if io.frame_count + 2 + channel.bdev.frames <= IO_FRAMES:
        channel.inflight += 1
        return module_start(channel, channel, io, saved, started)
    above = &io.frames[io.frame_count - 1]
    if (above.fn == module_done
            and last_of(<channel_t*>above.context, above.saved).through == channel):
        io.frame_count -= 1
        return walk(<channel_t*>above.context, channel, io, above.saved + 1, above.stamp)
    return walk(channel, channel, io, saved, started)


cdef int submit_through(channel_t* channel, io_t* io) noexcept nogil:
    """As channel.submit, where nothing but ``through`` and ``shift`` is set."""
    io.offset += channel.shift
    return bdev_submit(channel.through, io)


# --- after it ------------------------------------------------------------------------------

cdef inline channel_t* last_of(channel_t* channel, uint64_t saved) noexcept nogil:
    """The channel at which the walk ended."""
    cdef uint64_t steps = saved & STEPS_MASK
    while steps:
        channel = channel.through
        steps -= 1
    return channel


cdef inline void account(channel_t* channel, const io_t* io, uint64_t ticks) noexcept nogil:
    cdef op_stats_t* stats = &channel.stats[io.operation]
    if unlikely(io.status < 0):
        stats.errors += 1
        return
    stats.ops += 1
    stats.bytes += io.length
    stats.ticks += ticks
    if unlikely(ticks > stats.max_ticks):
        stats.max_ticks = ticks
    if unlikely(ticks < stats.min_ticks):
        stats.min_ticks = ticks
    if unlikely(channel.histogram != NULL):
        histogram_count(channel.histogram, io.operation, ticks)


cdef void channel_drained(channel_t* channel) noexcept nogil:
    """Nothing is in flight: whoever waited for that is told, and a channel that closes ends."""
    cdef message_t* message = channel.draining
    cdef message_t* following
    channel.draining = NULL
    if channel.flags & CHANNEL_CLOSING and channel.leave != NULL:
        channel.leave(channel)
    while message != NULL:
        following = message.next
        message_answer(message, 0)
        message = following


cdef inline void finish(
    channel_t* channel, io_t* io, uint64_t saved, uint64_t started
) noexcept nogil:
    """The I/O is over for all that the walk went through. Bound: the depth of the stack."""
    cdef uint64_t steps = saved & STEPS_MASK, ticks = channel.reactor.now - started
    cdef channel_t* below
    io.offset = saved & ~<uint64_t>OFFSET_LOW
    while True:
        below = channel.through
        account(channel, io, ticks)
        channel.inflight -= 1
        if unlikely(channel.draining != NULL) and channel.inflight == 0:
            channel_drained(channel)    # it may be gone then
        if steps == 0:
            return
        steps -= 1
        channel = below


cdef int give_up(channel_t* top, io_t* io, uint64_t saved, uint64_t started) noexcept nogil:
    """The next channel refused the I/O."""
    finish(top, io, saved, started)
    return SUBMIT_DONE


cdef int module_done(io_t* io, void* top, uint64_t saved, uint64_t started) noexcept nogil:
    """The entry's frame: whoever is above sees the I/O as it was submitted."""
    if unlikely(io.flags & IO_FUA) and flush_behind(<channel_t*>top, io, saved, started):
        return FRAME_TAKEN
    finish(<channel_t*>top, io, saved, started)
    return FRAME_DONE


cdef inline bint wants_flush(const channel_t* channel, const io_t* io) noexcept nogil:
    """A write that must be stable, on a module that cannot do so by itself."""
    if io.status < 0 or not channel.bdev.flags & BDEV_VOLATILE_CACHE:
        return False
    if io.operation == IO_WRITE:
        return not channel.bdev.flags & BDEV_FUA
    return io.operation == IO_WRITE_ZEROES


cdef bint flush_behind(
    channel_t* top, io_t* io, uint64_t saved, uint64_t started
) noexcept nogil:
    """For those above a write that needs a flush stays one I/O. Returns: is it still under way?"""
    cdef channel_t* last = last_of(top, saved)
    cdef uint8_t operation = io.operation
    if not wants_flush(last, io):
        return False
    if operation == IO_WRITE_ZEROES:
        saved |= FLUSHED_ZEROES
    io_push(io, flushed, top, saved, started)
    io.operation = IO_FLUSH
    if walk(last, last, io, 0, last.reactor.now) != SUBMIT_DONE:
        return True
    io.frame_count -= 1
    io.operation = operation
    return False


cdef int flushed(io_t* io, void* top, uint64_t saved, uint64_t started) noexcept nogil:
    io.operation = IO_WRITE_ZEROES if saved & FLUSHED_ZEROES else IO_WRITE
    finish(<channel_t*>top, io, saved, started)
    return FRAME_DONE


# --- what was held -------------------------------------------------------------------------

cdef int submit_again(channel_t* channel, io_t* io, uint64_t started) noexcept nogil:
    """The bdev may have another size than when it came."""
    io.status = check(channel.bdev, io)
    if io.status < 0:
        channel.stats[io.operation].errors += 1
        return SUBMIT_DONE
    return walk_on(channel, io, started)


cdef void send_held(channel_t* channel, io_t* io) noexcept nogil:
    if submit_again(channel, io, io.engine) == SUBMIT_DONE:
        io_complete(io)


cdef void channel_let_pass(timer_t* timer, void* context) noexcept nogil:
    """Send those whose turn it is. Bound: PASSING_MOST, the others in the next turn."""
    cdef channel_t* channel = <channel_t*>context
    cdef throttle_t* throttle = channel.throttle
    cdef uint64_t now = channel.reactor.now
    cdef io_t* io
    cdef int sent = 0
    if channel.flags & CHANNEL_GATED:
        return
    while sent < PASSING_MOST:
        io = qos_next(throttle, now)
        if io == NULL:
            break
        send_held(channel, io)
        sent += 1
    if qos_waits(throttle):
        reactor_timer_set(channel.reactor, timer,
                          now if sent == PASSING_MOST else qos_due(throttle, now))


cdef void channel_limits_changed(channel_t* channel) noexcept nogil:
    """What waits goes on by the limits that there are now, or ends when the bdev is removed."""
    cdef throttle_t* throttle = channel.throttle
    cdef io_t* io
    if throttle == NULL or channel.flags & CHANNEL_GATED:
        return
    if channel.flags & CHANNEL_LIMITED and not channel.flags & CHANNEL_REMOVED:
        channel_let_pass(&throttle.timer, channel)
        return
    reactor_timer_cancel(channel.reactor, &throttle.timer)
    while qos_waits(throttle):
        io = qos_oldest(throttle)
        if channel.flags & CHANNEL_REMOVED:
            io.status = -ENODEV
            io_complete(io)
        else:
            send_held(channel, io)


cdef void channel_release_held(channel_t* channel) noexcept nogil:
    """Send what the gate held back on its way, or to its end when removed."""
    cdef uint64_t now = channel.reactor.now
    cdef io_t* io
    cdef io_t* following
    cdef int how
    channel_limits_changed(channel)     # what waits there came before
    io = channel.held.first
    channel.held.first = NULL
    while io != NULL:
        following = io.link
        how = admit(channel, io) if channel.flags else ADMITTED
        if how == ADMITTED:
            how = submit_again(channel, io, now)
        if how == SUBMIT_DONE:
            io_complete(io)
        io = following
