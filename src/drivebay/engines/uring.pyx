"""io_uring without a library: two rings in shared memory and one system call a turn.

The ring is made disabled in a worker thread and enabled by the reactor that owns
it, so that the kernel may run completions on that thread only (DEFER_TASKRUN).
While the reactor polls, the eventfd is switched off. Sources: io_uring_setup(2),
io_uring_enter(2), Linux 6.1.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, EIO, ENOSYS, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_POPULATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from drivebay.memory.platform cimport (
    CHECK, fence_seq_cst, load_acquire_u32, load_relaxed_u32, store_release_u32,
)
from drivebay.reactor.io cimport (
    IO_FLUSH, IO_FUA, IO_MAY_UNMAP, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, io_complete,
    io_locate, io_t)
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport Reactor, engine_t, reactor_add_engine, reactor_t

import os
from threading import Lock

from drivebay.errors import HostError

cdef extern from "<linux/io_uring.h>" nogil:
    cdef struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t rw_flags
        uint64_t user_data
    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    cdef struct io_uring_rsrc_register:
        uint32_t nr
        uint32_t flags
    cdef struct io_uring_files_update:
        uint32_t offset
        uint64_t fds
    enum:
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE
        IORING_OP_READ, IORING_OP_WRITE
        IOSQE_ASYNC, IOSQE_FIXED_FILE
        IORING_SETUP_R_DISABLED, IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN
        IORING_SETUP_TASKRUN_FLAG, IORING_SETUP_CQSIZE
        IORING_ENTER_GETEVENTS, IORING_SQ_TASKRUN, IORING_SQ_CQ_OVERFLOW
        IORING_CQ_EVENTFD_DISABLED
        IORING_REGISTER_EVENTFD, IORING_REGISTER_ENABLE_RINGS, IORING_REGISTER_IOWQ_AFF
        IORING_REGISTER_FILES2, IORING_REGISTER_FILES_UPDATE, IORING_RSRC_REGISTER_SPARSE
        IORING_OFF_SQ_RING, IORING_OFF_SQES

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register
    long syscall(long number, ...)

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef extern from "<linux/falloc.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

cdef extern from "<linux/fs.h>" nogil:
    enum:
        RWF_DSYNC

cdef enum:
    ENTRIES = 256
    SUBMIT_AT_ONCE = 8          # the kernel holds a call's requests back until it has them all
    COMPLETIONS = 4096
    IOVECS_A_CALL = 1024        # IOV_MAX of the kernel
    CALL_BYTES = 2097152        # what one operation moves; the rest is another one
    TURN_BYTES = 8388608        # what a turn submits: the kernel copies cached pages at once
    MAX_CORES = 4096

# io_t.engine: the file descriptor, how it is used, and whether zeroes are made in the
# other way than asked.
cdef uint64_t FD_MASK = 0xFFFFFFFF
cdef uint64_t OTHER_WAY = <uint64_t>1 << 32
URING_WORKER = <uint64_t>1 << 33
URING_PLACE = <uint64_t>1 << 34

# What the ring is set up with, best first: what a kernel refuses is left out.
SETUP_FLAGS = (
    IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER
    | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
    IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE,
)
HINTS = {
    EPERM: "io_uring is switched off: see /proc/sys/kernel/io_uring_disabled, which must be 0, "
           "and the seccomp profile if this is a container",
    ENOSYS: "the kernel has no io_uring, or this container's seccomp profile hides it; "
            "Linux 6.1 or later is needed",
}
DEFAULT_HINT = "Linux 6.1 or later is needed, and /proc/sys/kernel/io_uring_disabled at 0"

making = Lock()


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
    sqe.fd = <int>(io.engine & FD_MASK)
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
    if uring.waiting == NULL and has_room(uring):
        prepare(uring, io)
        return
    io.link = NULL
    if uring.waiting == NULL:
        uring.waiting = io
    else:
        uring.waiting_last.link = io
    uring.waiting_last = io


cdef void uring_start(uring_t* uring, io_t* io, uint64_t file) noexcept nogil:
    io.engine = file
    io.done = 0
    uring.engine.inflight += 1
    enqueue(uring, io)


cdef void refill(uring_t* uring) noexcept nogil:
    cdef io_t* io = uring.waiting
    cdef io_t* following
    while io != NULL and has_room(uring):
        following = io.link
        prepare(uring, io)
        io = following
    uring.waiting = io


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
    uring.budget = TURN_BYTES


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


cdef int uring_poll(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """Reap what is there. Bound: the completions seen at the first look."""
    cdef uring_t* uring = <uring_t*>engine
    cdef uint32_t head = load_relaxed_u32(uring.cq_head)
    cdef uint32_t tail = load_acquire_u32(uring.cq_tail)
    cdef int count = 0
    cdef io_uring_cqe* cqe
    cdef io_t* io
    cdef int32_t result
    if head == tail:
        if not load_relaxed_u32(uring.sq_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW):
            return 0
        syscall(SYS_io_uring_enter, uring.ring, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0)
        tail = load_acquire_u32(uring.cq_tail)
    while head != tail:
        cqe = <io_uring_cqe*>uring.cqes + (head & uring.cq_mask)
        io = <io_t*>cqe.user_data
        result = cqe.res
        head += 1
        store_release_u32(uring.cq_head, head)
        count += 1
        if is_over(io, result):
            engine.inflight -= 1
            io_complete(io)
        else:
            enqueue(uring, io)
    return count


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


# --- the table of files --------------------------------------------------------------------

cdef void make_table(uring_t* uring) noexcept nogil:
    """Empty at first. A kernel that refuses it gets descriptors, as it does when it is full."""
    cdef io_uring_rsrc_register table
    cdef uint32_t i
    memset(&table, 0, sizeof(table))
    table.nr = URING_FILES
    table.flags = IORING_RSRC_REGISTER_SPARSE
    if syscall(SYS_io_uring_register, uring.ring, IORING_REGISTER_FILES2, &table,
               sizeof(table)) != 0:
        return
    for i in range(URING_FILES):
        uring.free_places[i] = <uint16_t>(URING_FILES - 1 - i)
    uring.free_count = URING_FILES


cdef bint set_place(uring_t* uring, uint32_t place, int32_t fd) noexcept nogil:
    cdef io_uring_files_update update
    memset(&update, 0, sizeof(update))
    update.offset = place
    update.fds = <uint64_t>&fd
    return syscall(SYS_io_uring_register, uring.ring, IORING_REGISTER_FILES_UPDATE, &update, 1) == 1


cdef uint64_t uring_register(uring_t* uring, int fd) noexcept nogil:
    """Put a file into the table, so that no request looks its descriptor up.

    Returns: what uring_start() takes. The table holds the file open until it is taken out.
    """
    cdef uint32_t place
    if uring.free_count == 0:
        return <uint64_t>fd
    place = uring.free_places[uring.free_count - 1]
    if not set_place(uring, place, fd):
        return <uint64_t>fd
    uring.free_count -= 1
    return place | URING_PLACE


cdef void uring_unregister(uring_t* uring, uint64_t file) noexcept nogil:
    """Take it out again; when none of its requests is in flight."""
    cdef uint32_t place = <uint32_t>(file & FD_MASK)
    if file & URING_PLACE and set_place(uring, place, -1):
        uring.free_places[uring.free_count] = <uint16_t>place
        uring.free_count += 1


# --- set-up --------------------------------------------------------------------------------

cdef void act_enable(message_t* message, void* reactor) noexcept nogil:
    """On the reactor's thread: from here on the ring is its own.

    argument: address and bytes of the mask of cores for the kernel's workers.
    """
    cdef uring_t* uring = <uring_t*>message.target
    cdef long status = syscall(
        SYS_io_uring_register, uring.ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0
    )
    CHECK(status == 0)
    make_table(uring)
    if message.argument[1]:
        # Best effort: without it the kernel's workers may share the reactor's core.
        syscall(SYS_io_uring_register, uring.ring, IORING_REGISTER_IOWQ_AFF,
                <void*>message.argument[0], message.argument[1])
    reactor_add_engine(<reactor_t*>reactor, &uring.engine)
    message_answer(message, 0)


cdef bytearray worker_cores(int reactor_core):
    """cpu_set_t bytes of the cores that are ours, without the reactor's; empty: leave it."""
    cores = os.sched_getaffinity(0) - {reactor_core}
    mask = bytearray(MAX_CORES // 8 if cores else 0)
    for core in cores:
        if core < MAX_CORES:
            mask[core // 8] |= 1 << core % 8
    return mask


cdef class UringEngine:
    def __cinit__(self):
        self.raw.ring = -1
        self.raw.engine.fd = -1

    def __init__(self):
        cdef io_uring_params params
        self.set_up(&params)
        self.map_rings(&params)
        self.raw.engine.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.raw.engine.fd < 0 or syscall(
                SYS_io_uring_register, self.raw.ring, IORING_REGISTER_EVENTFD,
                &self.raw.engine.fd, 1) != 0:
            raise HostError("cannot give the io_uring an eventfd", errno)
        self.raw.budget = TURN_BYTES
        self.raw.engine.flush = uring_flush
        self.raw.engine.poll = uring_poll
        self.raw.engine.arm = uring_arm
        uring_arm(&self.raw.engine, False)

    cdef int set_up(self, io_uring_params* params) except -1:
        for flags in SETUP_FLAGS:
            memset(params, 0, sizeof(params[0]))
            params.flags = flags
            params.cq_entries = COMPLETIONS
            self.raw.ring = syscall(SYS_io_uring_setup, ENTRIES, params)
            if self.raw.ring >= 0 or errno != EINVAL:
                break
        if self.raw.ring < 0:
            raise HostError("cannot make an io_uring", errno,
                            hint=HINTS.get(errno, DEFAULT_HINT))
        return 0

    cdef int map_rings(self, io_uring_params* params) except -1:
        cdef uint8_t* base
        cdef uint32_t i
        cdef uint32_t* array
        self.ring_bytes = max(params.sq_off.array + params.sq_entries * 4,
                              params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe))
        self.sqe_bytes = params.sq_entries * sizeof(io_uring_sqe)
        self.ring_memory = mmap(NULL, self.ring_bytes, PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_POPULATE, self.raw.ring, IORING_OFF_SQ_RING)
        self.raw.sqes = mmap(NULL, self.sqe_bytes, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_POPULATE, self.raw.ring, IORING_OFF_SQES)
        if self.ring_memory == MAP_FAILED or self.raw.sqes == MAP_FAILED:
            raise HostError("cannot map the io_uring", errno)
        base = <uint8_t*>self.ring_memory
        self.raw.entries = params.sq_entries
        self.raw.sq_mask = params.sq_entries - 1
        self.raw.cq_mask = params.cq_entries - 1
        self.raw.sq_head = <uint32_t*>(base + params.sq_off.head)
        self.raw.sq_tail = <uint32_t*>(base + params.sq_off.tail)
        self.raw.sq_flags = <uint32_t*>(base + params.sq_off.flags)
        self.raw.cq_head = <uint32_t*>(base + params.cq_off.head)
        self.raw.cq_tail = <uint32_t*>(base + params.cq_off.tail)
        self.raw.cq_flags = <uint32_t*>(base + params.cq_off.flags)
        self.raw.cqes = base + params.cq_off.cqes
        array = <uint32_t*>(base + params.sq_off.array)
        for i in range(params.sq_entries):
            array[i] = i
        return 0

    def enable(self, Reactor reactor):
        """Hand the ring to its reactor."""
        cores = worker_cores(reactor.core)
        cdef uint8_t[::1] view
        if not cores:
            return reactor.ask(act_enable, &self.raw, self)
        view = cores
        return reactor.ask(act_enable, &self.raw, (self, cores), <uint64_t>&view[0], len(cores))

    def close(self):
        """Only when the reactor's thread has ended, or the engine has left it."""
        if self.ring_memory != NULL and self.ring_memory != MAP_FAILED:
            munmap(self.ring_memory, self.ring_bytes)
        if self.raw.sqes != NULL and self.raw.sqes != MAP_FAILED:
            munmap(self.raw.sqes, self.sqe_bytes)
        self.ring_memory = NULL
        self.raw.sqes = NULL
        for fd in (self.raw.engine.fd, self.raw.ring):
            if fd >= 0:
                close(fd)
        self.raw.engine.fd = -1
        self.raw.ring = -1

    def __dealloc__(self):
        self.close()


cdef UringEngine uring_of(Reactor reactor):
    """The reactor's ring, made and handed over at the first file. Context: worker threads."""
    with making:
        found = reactor.shared.get("uring")
        if found is None:
            found = UringEngine()
            (<UringEngine>found).enable(reactor)
            reactor.shared["uring"] = found
    return found
