"""A disk in anonymous memory: reads and writes are one copy and done at once.

Unmap and write-zeroes of more than a piece go on across polls, so that one guest
that clears its disk does not hold up the others. Unmapped memory goes back to
the host.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.base cimport (
    Bdev, Channel, IO_FLUSH, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE,
    SUBMIT_PENDING, channel_t, io_complete, io_t,
)
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport engine_t, reactor_add_engine, reactor_remove_engine, reactor_t

from drivebay.errors import HostError

cdef extern from "<sys/mman.h>" nogil:
    int MADV_DONTDUMP, MADV_DONTNEED, MADV_HUGEPAGE
    int madvise(void* addr, size_t length, int advice)

cdef enum:
    PIECE_BYTES = 1048576
    PAGE_BYTES = 4096
    HUGE_BYTES = 2097152


cdef void copy_io(uint8_t* disk, io_t* io) noexcept nogil:
    cdef uint32_t i
    if io.operation == IO_READ:
        for i in range(io.iov_count):
            memcpy(io.iov[i].iov_base, disk, io.iov[i].iov_len)
            disk += io.iov[i].iov_len
    else:
        for i in range(io.iov_count):
            memcpy(disk, io.iov[i].iov_base, io.iov[i].iov_len)
            disk += io.iov[i].iov_len


cdef void clear(uint8_t* start, uint64_t length) noexcept nogil:
    """Zeroes: whole pages go back to the host, the rest is written."""
    cdef uint64_t head = -<uint64_t>start & (PAGE_BYTES - 1)
    cdef uint64_t pages
    if length < head + PAGE_BYTES:
        memset(start, 0, length)
        return
    pages = (length - head) & ~<uint64_t>(PAGE_BYTES - 1)
    memset(start, 0, head)
    madvise(start + head, pages, MADV_DONTNEED)
    memset(start + head + pages, 0, length - head - pages)


cdef bint clear_piece(uint8_t* memory, io_t* io) noexcept nogil:
    """Clear the next piece. Returns: whether the whole is done."""
    cdef uint64_t length = min(<uint64_t>PIECE_BYTES, io.length - io.done)
    clear(memory + io.offset + io.done, length)
    io.done += length
    return io.done == io.length


cdef int malloc_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef malloc_engine_t* engine = <malloc_engine_t*>channel.module
    io.status = 0
    if io.operation == IO_READ or io.operation == IO_WRITE:
        copy_io(engine.memory + io.offset, io)
        return SUBMIT_DONE
    if io.operation == IO_FLUSH or clear_piece(engine.memory, io):
        return SUBMIT_DONE
    io.link = NULL
    if engine.first == NULL:
        engine.first = io
    else:
        engine.last.link = io
    engine.last = io
    engine.engine.inflight += 1
    return SUBMIT_PENDING


cdef int malloc_poll(engine_t* base, reactor_t* reactor) noexcept nogil:
    """One piece of the oldest long operation; then the next one's turn."""
    cdef malloc_engine_t* engine = <malloc_engine_t*>base
    cdef io_t* io = engine.first
    if clear_piece(engine.memory, io):
        engine.first = io.link
        base.inflight -= 1
        io_complete(io)
    elif io.link != NULL:
        engine.first = io.link
        io.link = NULL
        engine.last.link = io
        engine.last = io
    return 1


cdef void malloc_flush(engine_t* base, reactor_t* reactor) noexcept nogil:
    pass


cdef bint malloc_arm(engine_t* base, bint armed) noexcept nogil:
    return True


cdef void act_add_engine(message_t* message, void* reactor) noexcept nogil:
    message_answer(message, reactor_add_engine(<reactor_t*>reactor, <engine_t*>message.target))


cdef void act_remove_engine(message_t* message, void* reactor) noexcept nogil:
    reactor_remove_engine(<reactor_t*>reactor, <engine_t*>message.target)
    message_answer(message, 0)


cdef class MallocChannel(Channel):
    def __init__(self, MallocBdev bdev, reactor):
        Channel.__init__(self, bdev, reactor)
        self.raw.submit = malloc_submit
        self.raw.module = &self.engine
        self.engine.engine.flush = malloc_flush
        self.engine.engine.poll = malloc_poll
        self.engine.engine.arm = malloc_arm
        self.engine.engine.fd = -1
        self.engine.memory = bdev.memory

    cdef void on_activate(self) noexcept:
        self.reactor.ask(act_add_engine, &self.engine.engine, self)

    def close(self):
        answer = Channel.close(self)
        if self.active:
            return self.reactor.ask(act_remove_engine, &self.engine.engine, (self, answer))
        return answer


cdef class MallocBdev(Bdev):
    product_name = "Malloc disk"
    module = "malloc"

    def __init__(self, str name, uuid, int block_size, num_blocks):
        Bdev.__init__(self, name, uuid, block_size, num_blocks)
        self.raw.operations = (1 << IO_READ | 1 << IO_WRITE | 1 << IO_FLUSH | 1 << IO_UNMAP
                               | 1 << IO_WRITE_ZEROES)
        self.mapping_bytes = self.raw.size + HUGE_BYTES
        base = mmap(NULL, self.mapping_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            raise HostError(f"no memory for malloc bdev '{name}' of {self.raw.size} bytes", ENOMEM)
        self.mapping = <uint8_t*>base
        self.memory = <uint8_t*>((<uint64_t>base + HUGE_BYTES - 1) & ~<uint64_t>(HUGE_BYTES - 1))
        madvise(self.memory, self.raw.size, MADV_HUGEPAGE)
        madvise(self.memory, self.raw.size, MADV_DONTDUMP)

    def open_channel(self, reactor):
        return MallocChannel(self, reactor)

    def save(self):
        return "bdev_malloc_create", {
            "name": self.name, "num_blocks": self.num_blocks, "block_size": self.block_size,
            "uuid": str(self.uuid)}

    def close(self):
        if self.mapping != NULL:
            with nogil:
                munmap(self.mapping, self.mapping_bytes)
            self.mapping = NULL

    def __dealloc__(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.mapping_bytes)
