"""A reactor's io_uring: made, handed over, and its table of files. No library is used.

The ring is made disabled in a worker thread and enabled by the reactor that owns
it, so that the kernel may run completions on that thread only (DEFER_TASKRUN).
While the reactor polls, the eventfd is switched off. A polled ring, for devices with poll
queues (uring_probe.pyx), is a second one beside it, and has none. What each request passes is in
uring_path.pyx. Sources: io_uring_setup(2), io_uring_register(2), Linux 6.1.
"""

from libc.errno cimport EINVAL, ENOSYS, EPERM, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_POPULATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from drivebay.engines.uring_kernel cimport (
    IORING_OFF_SQES, IORING_OFF_SQ_RING, IORING_REGISTER_ENABLE_RINGS, IORING_REGISTER_EVENTFD,
    IORING_REGISTER_FILES2, IORING_REGISTER_FILES_UPDATE, IORING_REGISTER_IOWQ_AFF,
    IORING_RSRC_REGISTER_SPARSE, IORING_SETUP_CQSIZE, IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_IOPOLL, IORING_SETUP_R_DISABLED, IORING_SETUP_SINGLE_ISSUER,
    IORING_SETUP_TASKRUN_FLAG,
    SYS_io_uring_register, SYS_io_uring_setup, io_uring_cqe, io_uring_files_update,
    io_uring_params, io_uring_rsrc_register, io_uring_sqe, syscall,
)
from drivebay.engines.uring_path cimport (
    URING_FILES, URING_PLACE, URING_TURN_BYTES, uring_arm, uring_flush, uring_poll,
    uring_poll_device, uring_t,
)
from drivebay.memory.platform cimport CHECK
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport Reactor, reactor_add_engine, reactor_t

import os
from threading import Lock

from drivebay.errors import HostError

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef enum:
    ENTRIES = 256
    COMPLETIONS = 4096
    MAX_CORES = 4096

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
    cdef uint32_t place = <uint32_t>file
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
    if uring.plain == NULL:
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

    def __init__(self, UringEngine plain=None):
        cdef io_uring_params params
        self.set_up(&params, 0 if plain is None else IORING_SETUP_IOPOLL)
        self.map_rings(&params)
        self.raw.budget = URING_TURN_BYTES
        self.raw.engine.flush = uring_flush
        self.raw.engine.arm = uring_arm
        self.raw.engine.poll = uring_poll
        uring_arm(&self.raw.engine, False)
        if plain is None:
            self.add_eventfd()
        else:
            self.plain = plain
            self.raw.plain = &plain.raw
            self.raw.engine.poll = uring_poll_device

    cdef int add_eventfd(self) except -1:
        self.raw.engine.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.raw.engine.fd < 0 or syscall(
                SYS_io_uring_register, self.raw.ring, IORING_REGISTER_EVENTFD,
                &self.raw.engine.fd, 1) != 0:
            raise HostError("cannot give the io_uring an eventfd", errno)
        return 0

    cdef int set_up(self, io_uring_params* params, uint32_t more) except -1:
        for flags in SETUP_FLAGS:
            memset(params, 0, sizeof(params[0]))
            params.flags = flags | more
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


cdef UringEngine polled_uring_of(Reactor reactor):
    """Its polled ring, the same way. It is made when there is a disk for it."""
    plain = uring_of(reactor)
    with making:
        found = reactor.shared.get("polled uring")
        if found is None:
            found = UringEngine(plain)
            (<UringEngine>found).enable(reactor)
            reactor.shared["polled uring"] = found
    return found
