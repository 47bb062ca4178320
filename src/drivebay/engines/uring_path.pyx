"""Submission and completion: one system call a turn for all files of a reactor.

A polled ring (IORING_SETUP_IOPOLL) is a second one, for reads and writes of devices with
poll queues. Nothing interrupts for these: each turn asks the kernel to look at the device,
and the reactor does not sleep while one is in flight, for the ring has no eventfd.

Context: reactor. Never: blocks, allocates, raises. Rings are made in uring.pyx.
Sources: io_uring_enter(2), Linux 6.1.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

from drivebay.engines.uring_kernel cimport (
    IORING_CQ_EVENTFD_DISABLED, IORING_ENTER_GETEVENTS, IORING_OP_FALLOCATE, IORING_OP_FSYNC,
    IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV, IORING_SQ_CQ_OVERFLOW,
    IORING_SQ_TASKRUN, IOSQE_ASYNC, IOSQE_FIXED_FILE, SYS_io_uring_enter, io_uring_cqe,
    io_uring_sqe, syscall,
)
from drivebay.memory.platform cimport (
    CHECK, fence_seq_cst, load_acquire_u32, load_relaxed_u32, store_release_u32,
)
from drivebay.reactor.io cimport (
    IO_FLUSH, IO_FUA, IO_MAY_UNMAP, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, io_complete,
    io_list_append, io_list_take, io_locate, io_t)
from drivebay.reactor.reactor cimport engine_t, reactor_t

cdef extern from "<linux/falloc.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

cdef extern from "<linux/fs.h>" nogil:
    enum:
        RWF_DSYNC

cdef enum:
    SUBMIT_AT_ONCE = 8          # the kernel holds a call's requests back until it has them all
    IOVECS_A_CALL = 1024        # IOV_MAX of the kernel
    CALL_BYTES = 2097152        # what one operation moves; the rest is another one

# io_t.engine: the file descriptor, how it is used, and whether zeroes are made in the
# other way than asked.
cdef uint64_t OTHER_WAY = <uint64_t>1 << 32
URING_WORKER = <uint64_t>1 << 33
URING_PLACE = <uint64_t>1 << 34
URING_POLLED = <uint64_t>1 << 35


# --- submission ----------------------------------------------------------------------------

cdef uint32_t count_iovecs(const io_t* io, uint32_t first, uint64_t skip,
                           uint64_t* length) noexcept nogil:
    """How many buffers the next call takes; one that is longer than a call is cut.

    A guest's request may be as long as its disk, and whatever is in the page cache is
    copied before the call returns: the other guests would wait for it. A call that begins
    inside a buffer takes no other one, so that the list is never changed.
    """
    cdef uint32_t i, count = min(io.iov_count - first, <uint32_t>IOVECS_A_CALL)
    if skip:
        length[0] = min(<uint64_t>io.iov[first].iov_len - skip, <uint64_t>CALL_BYTES)
        return 1
    length[0] = io.length - io.done
    if length[0] <= CALL_BYTES:
        return count
    length[0] = 0
    for i in range(count):
        if length[0] + io.iov[first + i].iov_len > CALL_BYTES:
            if i:
                return i
            length[0] = CALL_BYTES
            return 1
        length[0] += io.iov[first + i].iov_len
    return count


cdef void prepare_rw(uring_t* uring, io_uring_sqe* sqe, io_t* io) noexcept nogil:
    cdef uint64_t length = 0, skip = 0
    cdef uint32_t first = io_locate(io, &skip)
    cdef uint32_t count = count_iovecs(io, first, skip, &length)
    uring.budget -= <int64_t>length
    sqe.off = io.offset + io.done
    if io.operation == IO_WRITE and io.flags & IO_FUA:
        sqe.rw_flags = RWF_DSYNC
    if count == 1:
        sqe.opcode = IORING_OP_READ if io.operation == IO_READ else IORING_OP_WRITE
        sqe.addr = <uint64_t>io.iov[first].iov_base + skip
        sqe.len = <uint32_t>min(<uint64_t>io.iov[first].iov_len - skip, length)
    else:
        sqe.opcode = IORING_OP_READV if io.operation == IO_READ else IORING_OP_WRITEV
        sqe.addr = <uint64_t>&io.iov[first]
        sqe.len = count


cdef void prepare_range(io_uring_sqe* sqe, io_t* io) noexcept nogil:
    """A hole for unmap; zeroes as a hole where that is allowed, else in their blocks.

    Zeroes that a file or device does not make in that way are made in the other one.
    """
    cdef uint32_t how = FALLOC_FL_ZERO_RANGE
    cdef bint hole = (io.flags & IO_MAY_UNMAP) != 0
    if io.operation == IO_UNMAP or hole != ((io.engine & OTHER_WAY) != 0):
        how = FALLOC_FL_PUNCH_HOLE
    sqe.opcode = IORING_OP_FALLOCATE
    sqe.off = io.offset
    sqe.addr = io.length
    sqe.len = how | FALLOC_FL_KEEP_SIZE


cdef void prepare(uring_t* uring, io_t* io) noexcept nogil:
    cdef io_uring_sqe* sqe = <io_uring_sqe*>uring.sqes + (uring.tail & uring.sq_mask)
    memset(sqe, 0, sizeof(io_uring_sqe))
    sqe.fd = <int32_t><uint32_t>io.engine
    sqe.user_data = <uint64_t>io
    if io.engine & URING_WORKER:
        sqe.flags |= IOSQE_ASYNC
    if io.engine & URING_PLACE:
        sqe.flags |= IOSQE_FIXED_FILE
    if io.operation == IO_READ or io.operation == IO_WRITE:
        prepare_rw(uring, sqe, io)
    elif io.operation == IO_FLUSH:
        sqe.opcode = IORING_OP_FSYNC
    else:
        prepare_range(sqe, io)
    uring.tail += 1


cdef inline bint has_room(const uring_t* uring) noexcept nogil:
    return uring.budget > 0 and uring.tail - load_acquire_u32(uring.sq_head) < uring.entries


cdef void enqueue(uring_t* uring, io_t* io) noexcept nogil:
    """Into the ring, or behind those that wait for room in it."""
    uring.engine.unflushed += 1
    if uring.waiting.first == NULL and has_room(uring):
        prepare(uring, io)
    else:
        io_list_append(&uring.waiting, io)


cdef void uring_start(uring_t* uring, io_t* io, uint64_t file) noexcept nogil:
    io.engine = file
    io.done = 0
    uring.engine.inflight += 1
    enqueue(uring, io)


cdef void refill(uring_t* uring) noexcept nogil:
    while uring.waiting.first != NULL and has_room(uring):
        prepare(uring, io_list_take(&uring.waiting))


cdef void uring_flush(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Submit what is prepared. What the budget or the kernel leaves stays for the next turn."""
    cdef uring_t* uring = <uring_t*>engine
    cdef long taken
    cdef uint32_t ready
    while engine.unflushed:
        refill(uring)
        store_release_u32(uring.sq_tail, uring.tail)
        ready = min(uring.tail - load_acquire_u32(uring.sq_head), <uint32_t>SUBMIT_AT_ONCE)
        if ready == 0:
            break
        taken = syscall(SYS_io_uring_enter, uring.ring, ready, 0, IORING_ENTER_GETEVENTS, NULL, 0)
        if taken < 0:
            CHECK(errno == EAGAIN or errno == EBUSY or errno == EINTR)
            break
        engine.unflushed -= <uint32_t>taken
        if taken < ready:
            break
    uring.budget = URING_TURN_BYTES


# --- completion ----------------------------------------------------------------------------

cdef bint is_over(io_t* io, int32_t result) noexcept nogil:
    """Set the status of a finished I/O; False when it goes on."""
    if result == -EAGAIN or result == -EINTR:
        return False
    if result < 0:
        if (result == -EOPNOTSUPP and io.operation == IO_WRITE_ZEROES
                and not io.engine & OTHER_WAY):
            io.engine |= OTHER_WAY
            return False
        if result == -EOPNOTSUPP and io.engine & URING_POLLED:
            io.engine &= ~URING_POLLED
            return False
        io.status = result
        return True
    io.status = 0
    if io.operation != IO_READ and io.operation != IO_WRITE:
        return True
    if result == 0:
        io.status = -EIO            # the file ends before the bdev does
        return True
    io.done += <uint64_t>result
    return io.done == io.length


cdef void go_on(uring_t* uring, io_t* io) noexcept nogil:
    """The rest of it; or all of it without polling, when the device has lost its poll queues."""
    if uring.plain != NULL and not io.engine & URING_POLLED:
        uring.engine.inflight -= 1
        uring_start(uring.plain, io, io.engine)
    else:
        enqueue(uring, io)


cdef inline int reap(uring_t* uring, uint32_t head, uint32_t tail) noexcept nogil:
    cdef int count = 0
    cdef io_uring_cqe* cqe
    cdef io_t* io
    cdef int32_t result
    while head != tail:
        cqe = <io_uring_cqe*>uring.cqes + (head & uring.cq_mask)
        io = <io_t*>cqe.user_data
        result = cqe.res
        head += 1
        store_release_u32(uring.cq_head, head)
        count += 1
        if is_over(io, result):
            uring.engine.inflight -= 1
            io_complete(io)
        else:
            go_on(uring, io)
    return count


cdef int uring_poll(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Reap what is there. Bound: the completions seen at the first look."""
    cdef uring_t* uring = <uring_t*>engine
    cdef uint32_t head = load_relaxed_u32(uring.cq_head)
    cdef uint32_t tail = load_acquire_u32(uring.cq_tail)
    if head == tail:
        if not load_relaxed_u32(uring.sq_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW):
            return 0
        syscall(SYS_io_uring_enter, uring.ring, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0)
        tail = load_acquire_u32(uring.cq_tail)
    return reap(uring, head, tail)


cdef int uring_poll_device(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Have the kernel look at the devices once, without waiting, and reap. Bound: as above."""
    cdef uring_t* uring = <uring_t*>engine
    cdef uint32_t head = load_relaxed_u32(uring.cq_head)
    if head == load_acquire_u32(uring.cq_tail):
        syscall(SYS_io_uring_enter, uring.ring, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0)
    return reap(uring, head, load_acquire_u32(uring.cq_tail))


cdef bint uring_arm(engine_t* engine, bint armed) noexcept nogil:
    cdef uring_t* uring = <uring_t*>engine
    if not armed:
        store_release_u32(uring.cq_flags,
                          load_relaxed_u32(uring.cq_flags) | IORING_CQ_EVENTFD_DISABLED)
        return False
    store_release_u32(uring.cq_flags,
                      load_relaxed_u32(uring.cq_flags) & ~<uint32_t>IORING_CQ_EVENTFD_DISABLED)
    fence_seq_cst()
    return (load_relaxed_u32(uring.cq_head) != load_acquire_u32(uring.cq_tail)
            or load_relaxed_u32(uring.sq_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))
