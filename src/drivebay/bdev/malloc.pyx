"""A disk in anonymous memory: reads and writes are one copy and done at once.

The memory is taken when the bdev is made, in a worker thread: a page fault in a
reactor would hold up everybody's disks for as long as the host needs for a page.
What is longer than a piece goes on across polls, a piece in each turn, so that one
guest that clears its disk, or reads all of it into one buffer, does not hold up the
others. Unmapped memory goes back to the host.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.base cimport (
    Bdev, Channel, IO_FLUSH, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE,
    SUBMIT_PENDING, channel_t, io_complete, io_t,
)
from drivebay.reactor.io cimport io_locate
from drivebay.reactor.mailbox cimport message_answer, message_t
from drivebay.reactor.reactor cimport Reactor, engine_t, reactor_add_engine, reactor_t

from pathlib import Path
from uuid import uuid4

from drivebay.errors import HostError, UsageError

cdef extern from "<sys/mman.h>" nogil:
    int MADV_DONTDUMP, MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE
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


cdef bint clear_piece(io_t* io) noexcept nogil:
    """Clear the next piece; io.engine is where the disk's part begins. Returns: is all done?"""
    cdef uint64_t length = min(<uint64_t>PIECE_BYTES, io.length - io.done)
    clear(<uint8_t*>io.engine + io.done, length)
    io.done += length
    return io.done == io.length


cdef bint copy_piece(io_t* io) noexcept nogil:
    """Copy the next piece. Returns: is all done?"""
    cdef uint64_t left = min(<uint64_t>PIECE_BYTES, io.length - io.done), skip = 0, part
    cdef uint32_t i = io_locate(io, &skip)
    cdef uint8_t* disk
    cdef uint8_t* place
    while left:
        disk = <uint8_t*>io.engine + io.done
        place = <uint8_t*>io.iov[i].iov_base + skip
        part = min(<uint64_t>io.iov[i].iov_len - skip, left)
        if io.operation == IO_READ:
            memcpy(place, disk, part)
        else:
            memcpy(disk, place, part)
        io.done += part
        left -= part
        skip = 0
        i += 1
    return io.done == io.length


cdef int malloc_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef malloc_t* disk = <malloc_t*>channel.module
    io.status = 0
    if io.operation == IO_FLUSH:
        return SUBMIT_DONE
    if io.length > PIECE_BYTES:
        io.engine = <uint64_t>(disk.memory + io.offset)
        append(disk.pieces, io)
        disk.pieces.engine.inflight += 1
        return SUBMIT_PENDING
    if io.operation == IO_READ or io.operation == IO_WRITE:
        copy_io(disk.memory + io.offset, io)
    else:
        clear(disk.memory + io.offset, io.length)
    return SUBMIT_DONE


cdef void append(pieces_t* pieces, io_t* io) noexcept nogil:
    io.link = NULL
    if pieces.first == NULL:
        pieces.first = io
    else:
        pieces.last.link = io
    pieces.last = io


cdef int pieces_poll(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """One piece of the oldest long operation; then it is the next one's turn."""
    cdef pieces_t* pieces = <pieces_t*>engine
    cdef io_t* io = pieces.first
    pieces.first = io.link
    if copy_piece(io) if io.operation == IO_READ or io.operation == IO_WRITE else clear_piece(io):
        engine.inflight -= 1
        io_complete(io)
    else:
        append(pieces, io)
    return 1


cdef void pieces_flush(engine_t* engine, reactor_t* reactor) noexcept nogil:
    pass


cdef bint pieces_arm(engine_t* engine, bint armed) noexcept nogil:
    return True


cdef void act_add_engine(message_t* message, void* reactor) noexcept nogil:
    reactor_add_engine(<reactor_t*>reactor, <engine_t*>message.target)
    message_answer(message, 0)


def available_memory():
    """Bytes that can be taken without swapping, as the kernel reckons (proc(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


cdef class PiecesEngine:
    """One a reactor; lives as long as the reactor does."""

    def __init__(self):
        self.raw.engine.flush = pieces_flush
        self.raw.engine.poll = pieces_poll
        self.raw.engine.arm = pieces_arm
        self.raw.engine.fd = -1

    def close(self):
        """Nothing to give back."""


cdef PiecesEngine pieces_of(Reactor reactor):
    """The reactor's engine, made and handed over at the first malloc bdev.

    Worker threads may come here at the same time: the first engine noted is the one.
    """
    cdef PiecesEngine made
    found = reactor.shared.get("pieces")
    if found is None:
        made = PiecesEngine()
        found = reactor.shared.setdefault("pieces", made)
        if found is made:
            reactor.ask(act_add_engine, &made.raw.engine, made)
    return found


cdef class MallocChannel(Channel):
    def __init__(self, MallocBdev bdev, reactor):
        Channel.__init__(self, bdev, reactor)
        self.pieces = pieces_of(self.reactor)
        self.disk.memory = bdev.memory
        self.disk.pieces = &self.pieces.raw
        self.raw.submit = malloc_submit
        self.raw.module = &self.disk


cdef class MallocBdev(Bdev):
    product_name = "Malloc disk"
    module = "malloc"

    def __init__(self, str name, uuid, int block_size, num_blocks):
        Bdev.__init__(self, name, uuid, block_size, num_blocks)
        self.instance = uuid4()     # its uuid may be that of one that was there before
        self.raw.operations = (1 << IO_READ | 1 << IO_WRITE | 1 << IO_FLUSH | 1 << IO_UNMAP
                               | 1 << IO_WRITE_ZEROES)
        if self.raw.size > available_memory():
            raise HostError(
                f"malloc bdev '{name}' of {self.raw.size} bytes is larger than free memory", ENOMEM)
        self.mapping_bytes = self.raw.size + HUGE_BYTES
        base = mmap(NULL, self.mapping_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            raise HostError(f"no memory for malloc bdev '{name}' of {self.raw.size} bytes", ENOMEM)
        self.mapping = <uint8_t*>base
        self.memory = <uint8_t*>((<uint64_t>base + HUGE_BYTES - 1) & ~<uint64_t>(HUGE_BYTES - 1))
        self.populate()

    @property
    def content_id(self):
        return f"memory {self.instance}"

    @property
    def volatile_content(self):
        return True

    cdef int populate(self) except -1:
        cdef uint64_t length = (self.raw.size + PAGE_BYTES - 1) & ~<uint64_t>(PAGE_BYTES - 1)
        cdef int status
        madvise(self.memory, length, MADV_HUGEPAGE)
        madvise(self.memory, length, MADV_DONTDUMP)
        with nogil:
            status = madvise(self.memory, length, MADV_POPULATE_WRITE)
        if status != 0:
            raise HostError(f"cannot take the memory of malloc bdev '{self.name}'", errno)
        return 0

    def resize(self, num_blocks):
        if num_blocks * self.block_size > self.mapping_bytes - HUGE_BYTES:
            raise UsageError(f"malloc bdev '{self.name}' cannot grow: it has the memory of "
                             f"{self.num_blocks} blocks", field="num_blocks")
        Bdev.resize(self, num_blocks)

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
