"""The error bdev: a disk that fails, hangs or lies when control says so, for trying faults.

Control sets what an operation has to suffer, and how often; reactors count it down with
compare and exchange, so that exactly that many fail whatever the number of queues. While
nothing is injected an I/O costs one look more than its base.

The guest's memory is never changed by a write: the base gets the caller's buffers with the
one wrong byte in place of theirs. Data that was read is changed before the answer.
"""

from libc.errno cimport EIO, ENODEV
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drivebay.bdev.base cimport (
    FRAME_DONE, IO_READ, IO_WRITE, SUBMIT_DONE, SUBMIT_QUEUED, Bdev, Channel, channel_t,
    io_complete, io_push, io_t)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.filter cimport FilterBdev
from drivebay.memory.platform cimport (
    compare_exchange_u32, load_acquire_u32, load_relaxed_u64, store_release_u32, store_relaxed_u64)
from drivebay.reactor.io cimport BLOCK_IOVECS, io_list_append, io_list_t, io_list_take
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport reactor_timer_cancel, reactor_timer_set
from drivebay.reactor.timer cimport timer_t

OPERATIONS = ("read", "write", "flush", "unmap")    # by their IO_ numbers
KINDS = ("failure", "pending", "corrupt_data", "nomem")     # by their ERROR_ numbers

cdef enum:
    CORRUPTIONS = 8         # writes at once that a channel can corrupt; others wait
    RETRIES_A_SECOND = 100  # of I/O that was told that there is no memory


cdef inline bint take(injection_t* injection) noexcept nogil:
    """One less to fail. Bound: retried only while other reactors take theirs."""
    cdef uint32_t left
    while True:
        left = load_acquire_u32(&injection.left)
        if left == 0:
            return False
        if compare_exchange_u32(&injection.left, left, left - 1):
            return True


cdef bint error_place(channel_t* channel, io_t* io) noexcept nogil:
    """Nothing is injected: straight to the base."""
    cdef error_t* error = <error_t*>channel.module
    return (io.operation >= INJECTIONS
            or load_acquire_u32(&error.injections[io.operation].left) == 0)


cdef int start(error_t* error, io_t* io) noexcept nogil:
    """Submit an I/O, or let it suffer what is injected. As channel.submit."""
    cdef injection_t* injection = &error.injections[io.operation]
    if error_place(error.channel, io):
        return bdev_submit(error.base, io)
    if error.channel.inflight - error.held < load_relaxed_u64(&injection.queue_depth):
        return bdev_submit(error.base, io)
    if not take(injection):
        return bdev_submit(error.base, io)
    if injection.kind == ERROR_PENDING:
        return hold(error, &error.pending, io)
    if injection.kind == ERROR_NOMEM:
        if error.starved.first == NULL:
            reactor_timer_set(error.channel.reactor, &error.retry, error.channel.reactor.now
                              + error.channel.reactor.ticks_a_second // RETRIES_A_SECOND)
        return hold(error, &error.starved, io)
    if injection.kind == ERROR_CORRUPT:
        return corrupt(error, io)
    io.status = -EIO
    return SUBMIT_DONE


cdef int error_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef error_t* error = <error_t*>channel.module
    cdef int how
    error.held += 1     # it is none of those with the base
    how = start(error, io)
    error.held -= 1
    return how


cdef int hold(error_t* error, io_list_t* waiting, io_t* io) noexcept nogil:
    io_list_append(waiting, io)
    error.held += 1
    return SUBMIT_QUEUED


cdef void start_again(error_t* error, io_list_t* waiting) noexcept nogil:
    """Those that are held now, the oldest first. Bound: their number."""
    cdef io_t* io = waiting.first
    cdef io_t* following
    cdef int how
    waiting.first = NULL
    while io != NULL:
        following = io.link
        how = start(error, io)
        error.held -= 1     # not before: it was none of those with the base
        if how == SUBMIT_DONE:
            io_complete(io)
        io = following


cdef void retry(timer_t* timer, void* context) noexcept nogil:
    cdef error_t* error = <error_t*>context
    start_again(error, &error.starved)


# --- wrong data ----------------------------------------------------------------------------

cdef int corrupt(error_t* error, io_t* io) noexcept nogil:
    cdef injection_t* injection = &error.injections[io.operation]
    cdef uint64_t offset = load_relaxed_u64(&injection.corrupt_offset)
    cdef uint64_t value = load_relaxed_u64(&injection.corrupt_value)
    cdef int how
    if offset >= io.length or io.operation != IO_READ and io.operation != IO_WRITE:
        return bdev_submit(error.base, io)
    if io.operation == IO_WRITE:
        if io.iov_count > BLOCK_IOVECS - 2:     # those below have room for no more
            io.status = -EIO
            return SUBMIT_DONE
        io.engine = offset << 8 | value     # an offset within an I/O has far less than 56 bits
        return write_wrong(error, io)
    io_push(io, read_done, NULL, offset, value)
    how = bdev_submit(error.base, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        read_done(io, NULL, offset, value)
    return how


cdef inline uint32_t locate(const io_t* io, uint64_t* offset) noexcept nogil:
    """The buffer in which a byte of an I/O lies, and where in it. Bound: the buffers."""
    cdef uint32_t i = 0
    while offset[0] >= io.iov[i].iov_len:
        offset[0] -= io.iov[i].iov_len
        i += 1
    return i


cdef int read_done(io_t* io, void* context, uint64_t offset, uint64_t value) noexcept nogil:
    cdef uint32_t i
    if io.status >= 0:
        i = locate(io, &offset)
        (<uint8_t*>io.iov[i].iov_base)[offset] ^= <uint8_t>value
    return FRAME_DONE


cdef int write_wrong(error_t* error, io_t* io) noexcept nogil:
    """Hand the caller's buffers down, cut where our byte takes the place of theirs."""
    cdef corruption_t* corruption = error.free
    cdef uint64_t offset = io.engine >> 8
    cdef uint32_t i, at, count
    cdef uint8_t* buffer
    cdef int how
    if corruption == NULL:
        return hold(error, &error.uncorrupted, io)
    error.free = corruption.next
    corruption.iov = io.iov
    corruption.iov_count = io.iov_count
    at = locate(io, &offset)
    buffer = <uint8_t*>io.iov[at].iov_base
    corruption.byte = buffer[offset] ^ <uint8_t>(io.engine & 0xff)
    count = 0
    for i in range(io.iov_count):
        if i != at:
            count = put(corruption, count, io.iov[i].iov_base, io.iov[i].iov_len)
            continue
        count = put(corruption, count, buffer, offset)
        count = put(corruption, count, &corruption.byte, 1)
        count = put(corruption, count, buffer + offset + 1, io.iov[i].iov_len - offset - 1)
    io.iov = corruption.parts
    io.iov_count = count
    io_push(io, write_done, corruption, 0)
    how = bdev_submit(error.base, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        give_back(corruption, io)
    return how


cdef inline uint32_t put(
    corruption_t* corruption, uint32_t count, void* buffer, uint64_t length
) noexcept nogil:
    if length == 0:
        return count
    corruption.parts[count].iov_base = buffer
    corruption.parts[count].iov_len = length
    return count + 1


cdef void give_back(corruption_t* corruption, io_t* io) noexcept nogil:
    io.iov = corruption.iov
    io.iov_count = corruption.iov_count
    corruption.next = corruption.error.free
    corruption.error.free = corruption


cdef int write_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    """The caller's buffers again; those that wait may have ours. Bound: their number."""
    cdef corruption_t* corruption = <corruption_t*>context
    cdef error_t* error = corruption.error
    cdef io_t* waiting
    give_back(corruption, io)
    while error.free != NULL and error.uncorrupted.first != NULL:
        waiting = io_list_take(&error.uncorrupted)
        error.held -= 1
        if write_wrong(error, waiting) == SUBMIT_DONE:
            io_complete(waiting)
    return FRAME_DONE


# --- control -------------------------------------------------------------------------------

cdef void act_resume(message_t* message, void* reactor) noexcept nogil:
    cdef error_t* error = <error_t*>message.target
    start_again(error, &error.pending)
    message_answer(message, 0)


cdef void drop(error_t* error, io_list_t* waiting) noexcept nogil:
    """End those that the base never saw. Bound: their number."""
    cdef io_t* io
    while waiting.first != NULL:
        io = io_list_take(waiting)
        error.held -= 1
        io.status = -ENODEV
        io_complete(io)


cdef void act_drop(message_t* message, void* reactor) noexcept nogil:
    cdef error_t* error = <error_t*>message.target
    reactor_timer_cancel(error.channel.reactor, &error.retry)
    drop(error, &error.pending)
    drop(error, &error.starved)
    message_answer(message, 0)


cdef class ErrorChannel(Channel):
    def __init__(self, ErrorBdev bdev, reactor, Channel base):
        cdef int i
        Channel.__init__(self, bdev, reactor)
        self.corruptions = <corruption_t*>calloc(CORRUPTIONS, sizeof(corruption_t))
        if self.corruptions == NULL:
            raise MemoryError(f"no memory for a channel of bdev '{bdev.name}'")
        self.error.channel = &self.raw
        self.error.base = &base.raw
        self.error.injections = bdev.injections
        self.error.retry.fn = retry
        self.error.retry.context = &self.error
        for i in range(CORRUPTIONS):
            self.corruptions[i].error = &self.error
            self.corruptions[i].next = self.error.free
            self.error.free = &self.corruptions[i]
        self.raw.through = &base.raw
        self.raw.place = error_place
        self.raw.submit = error_submit
        self.raw.module = &self.error

    def __dealloc__(self):
        free(self.corruptions)

    def resume(self):
        return self.reactor.ask(act_resume, &self.error, self)

    def remove(self):
        answer = Channel.remove(self)
        self.reactor.ask(act_drop, &self.error, self)
        return answer

    def close(self):
        answer = Channel.close(self)
        self.reactor.ask(act_drop, &self.error, self)
        return answer


cdef class ErrorBdev(FilterBdev):
    product_name = "Error Injection Disk"
    module = "error"

    def __init__(self, str name, uuid, Bdev base):
        FilterBdev.__init__(self, name, uuid, base)
        self.stand_on([base], own_frames=1)

    def inject(self, operation, kind, uint32_t num=1, uint64_t queue_depth=0,
               uint64_t corrupt_offset=0, uint8_t corrupt_value=0):
        cdef injection_t* injection = &self.injections[OPERATIONS.index(operation)]
        store_release_u32(&injection.left, 0)
        injection.kind = KINDS.index(kind)
        store_relaxed_u64(&injection.queue_depth, queue_depth)
        store_relaxed_u64(&injection.corrupt_offset, corrupt_offset)
        store_relaxed_u64(&injection.corrupt_value, corrupt_value)
        store_release_u32(&injection.left, num)

    def clear(self, operation):
        store_release_u32(&self.injections[OPERATIONS.index(operation)].left, 0)

    def clear_pending(self):
        for i, operation in enumerate(OPERATIONS):
            if self.injections[i].kind == ERROR_PENDING:
                self.clear(operation)

    def left(self, operation):
        return load_acquire_u32(&self.injections[OPERATIONS.index(operation)].left)

    def open_channel(self, reactor, *bases):
        return ErrorChannel(self, reactor, bases[0])

    def driver_specific(self):
        return {"error_disk": {"base_bdev": self.bases[0].name}}
