"""What every I/O passes on its way to a module, in this order: range and
capability, the quiesce gate, limits, alignment of its buffers, statistics.

Each is one flag test while it is not needed. Context: reactor; never waits.
"""

from libc.errno cimport EINVAL, ENODEV, EOPNOTSUPP, ERANGE, EROFS
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport (
    BDEV_FUA, BDEV_VOLATILE_CACHE, CHANNEL_GATED, CHANNEL_LIMITED, CHANNEL_REMOVED, FRAME_DONE,
    FRAME_TAKEN, IO_FLUSH, IO_FUA, IO_READ, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_QUEUED,
    bdev_t, channel_settle, channel_t, io_complete, io_push, io_t, op_stats_t,
)
from drivebay.bdev.bounce cimport bounce_submit
from drivebay.bdev.histogram cimport histogram_count
from drivebay.bdev.qos cimport (
    qos_due, qos_hold, qos_may_pass, qos_next, qos_oldest, qos_waits, throttle_t)
from drivebay.memory.platform cimport load_relaxed_u64
from drivebay.reactor.io cimport io_list_append
from drivebay.reactor.reactor cimport reactor_timer_cancel, reactor_timer_set
from drivebay.reactor.timer cimport timer_t

cdef enum:
    PASSING_MOST = 64       # of those that a limit held back, in one turn


cdef inline int check(const bdev_t* bdev, const io_t* io) noexcept nogil:
    """0 or -errno: does the bdev have this operation and these blocks?"""
    cdef uint64_t size
    if not bdev.operations & (<uint32_t>1 << io.operation):
        return -EOPNOTSUPP if bdev.operations & (1 << IO_WRITE) else -EROFS
    if io.operation == IO_FLUSH:
        return 0
    size = load_relaxed_u64(&bdev.size)
    if io.offset > size or io.length > size - io.offset:
        return -ERANGE
    if (io.offset | io.length) & (bdev.block_size - 1):
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


cdef inline void account(channel_t* channel, const io_t* io, uint64_t started) noexcept nogil:
    cdef op_stats_t* stats = &channel.stats[io.operation]
    cdef uint64_t ticks = channel.reactor.now - started
    if io.status < 0:
        stats.errors += 1
        return
    stats.ops += 1
    if io.operation != IO_FLUSH:    # its length is the write's that it follows
        stats.bytes += io.length
    stats.ticks += ticks
    if ticks > stats.max_ticks:
        stats.max_ticks = ticks
    if ticks < stats.min_ticks:
        stats.min_ticks = ticks
    if channel.histogram != NULL:
        histogram_count(channel.histogram, io.operation, ticks)


cdef inline bint wants_flush(const channel_t* channel, const io_t* io) noexcept nogil:
    """A write that must be stable, on a module that cannot do so by itself."""
    if not io.flags & IO_FUA or io.status < 0 or not channel.bdev.flags & BDEV_VOLATILE_CACHE:
        return False
    if io.operation == IO_WRITE:
        return not channel.bdev.flags & BDEV_FUA
    return io.operation == IO_WRITE_ZEROES


cdef int module_done(io_t* io, void* context, uint64_t offset, uint64_t started) noexcept nogil:
    """The entry's frame: whoever is above sees the I/O as it was submitted."""
    cdef channel_t* channel = <channel_t*>context
    io.offset = offset
    account(channel, io, started)
    if wants_flush(channel, io) and flush_too(channel, io) != SUBMIT_DONE:
        channel.inflight -= 1
        return FRAME_TAKEN
    channel_settle(channel)
    return FRAME_DONE


cdef int flushed(io_t* io, void* context, uint64_t operation, uint64_t stamp) noexcept nogil:
    io.operation = <uint8_t>operation
    return FRAME_DONE


cdef int flush_too(channel_t* channel, io_t* io) noexcept nogil:
    """The flush behind a write; for those above it stays one I/O, the write."""
    cdef uint8_t operation = io.operation
    cdef int how
    io_push(io, flushed, channel, operation)
    io.operation = IO_FLUSH
    how = module_submit(channel, io, channel.reactor.now)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        io.operation = operation
    return how


cdef inline int module_start(channel_t* channel, io_t* io, uint64_t started) noexcept nogil:
    """Straight to the module, or in pieces through a bounce buffer: it counts as one I/O."""
    cdef int how
    io.channel = channel
    io.done = 0
    io_push(io, module_done, channel, io.offset, started)
    if channel.bdev.buffer_mask and is_misaligned(io, channel.bdev):
        how = bounce_submit(channel, io)
    else:
        how = channel.submit(channel, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        io.offset = io.frames[io.frame_count].saved
        account(channel, io, started)
        if wants_flush(channel, io):
            return flush_too(channel, io)
        return SUBMIT_DONE
    channel.inflight += 1
    return how


cdef int module_submit(channel_t* channel, io_t* io, uint64_t started) noexcept nogil:
    """The same, for those that are not the common case: there it is in line."""
    return module_start(channel, io, started)


cdef int hold(channel_t* channel, io_t* io) noexcept nogil:
    io_list_append(&channel.held, io)
    return SUBMIT_QUEUED


cdef int bdev_submit(channel_t* channel, io_t* io) noexcept nogil:
    """Start an I/O. Returns: SUBMIT_DONE with io.status, or PENDING, or QUEUED."""
    io.status = check(channel.bdev, io)
    if io.status < 0:
        channel.stats[io.operation].errors += 1
        return SUBMIT_DONE
    if channel.flags:
        if channel.flags & CHANNEL_REMOVED:
            io.status = -ENODEV
            return SUBMIT_DONE
        io.channel = channel
        if channel.flags & CHANNEL_GATED:
            return hold(channel, io)
        return submit_limited(channel, io)
    return module_start(channel, io, channel.reactor.now)


# --- limits --------------------------------------------------------------------------------

cdef int submit_limited(channel_t* channel, io_t* io) noexcept nogil:
    """Reads and writes wait for the limits; the wait is part of their latency here."""
    cdef throttle_t* throttle = channel.throttle
    cdef uint64_t now = channel.reactor.now, due
    if io.operation != IO_READ and io.operation != IO_WRITE or qos_may_pass(throttle, io, now):
        return module_submit(channel, io, now)
    io.engine = now
    qos_hold(throttle, io)
    due = qos_due(throttle, now)
    if not throttle.timer.pending or due < throttle.timer.deadline:
        reactor_timer_set(channel.reactor, &throttle.timer, due)
    return SUBMIT_QUEUED


cdef void send_held(channel_t* channel, io_t* io) noexcept nogil:
    """The bdev may have another size than when it came."""
    io.status = check(channel.bdev, io)
    if io.status < 0:
        channel.stats[io.operation].errors += 1
    elif module_submit(channel, io, io.engine) != SUBMIT_DONE:
        return
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
    cdef io_t* io
    cdef io_t* following
    channel_limits_changed(channel)     # what waits there came before
    io = channel.held.first
    channel.held.first = NULL
    while io != NULL:
        following = io.link
        if bdev_submit(channel, io) == SUBMIT_DONE:
            io_complete(io)
        io = following
