"""A disk in anonymous memory: reads and writes are one copy.

The memory is taken when the bdev is made, in a worker thread: a page fault in a
reactor would hold up everybody's disks for as long as the host needs for a page.
Unmapped memory goes back to the host.

Most of a short copy is the wait for the disk's cache lines, so short ones are left to
the end of the turn, and the lines of each are fetched while the one before is copied.
What is longer than a piece goes on across polls, a piece in each turn, so that one
guest that clears its disk, or reads all of it into one buffer, does not hold up the
others. What lies between is copied at once.
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
from drivebay.memory.platform cimport prefetch_read, prefetch_write
from drivebay.reactor.io cimport io_list_append, io_list_take, io_locate
from drivebay.reactor.reactor cimport engine_t, reactor_t
from drivebay.reactor.turn_engine cimport engine_of

from pathlib import Path
from uuid import uuid4

from drivebay.errors import HostError, UsageError

cdef extern from "<sys/mman.h>" nogil:
    int MADV_DONTDUMP, MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE
    int madvise(void* addr, size_t length, int advice)

cdef enum:
    SHORT_BYTES = 8192      # as many of them as a poll takes are soon copied
    PIECE_BYTES = 1048576
    LINE_BYTES = 64
    FIRST_LINES_BYTES = 512     # fetched at once, while nothing is copied yet
    READ_AHEAD_BYTES = 1024     # more than that the processor fetches itself when it reads
    PAGE_BYTES = 4096
    HUGE_BYTES = 2097152


cdef inline void copy_io(const io_t* io) noexcept nogil:
    """io.engine is where the disk's part begins."""
    cdef uint8_t* disk = <uint8_t*>io.engine
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
    """Clear the next piece, at most a huge page. Returns: is all done?

    One that is given back in two parts comes back as small pages, and those are slow.
    """
    cdef uint64_t at = io.engine + io.done
    cdef uint64_t length = min(HUGE_BYTES - (at & (HUGE_BYTES - 1)), io.length - io.done)
    clear(<uint8_t*>at, length)
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


cdef inline bint is_copy(const io_t* io) noexcept nogil:
    return io.operation == IO_READ or io.operation == IO_WRITE


cdef int malloc_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef malloc_t* disk = <malloc_t*>channel.module
    io.status = 0
    if io.operation == IO_FLUSH:
        return SUBMIT_DONE
    io.engine = <uint64_t>(disk.memory + io.offset)
    if io.length <= SHORT_BYTES and is_copy(io):
        if disk.copies.short.first == NULL:
            fetch_lines(io, FIRST_LINES_BYTES)
        io_list_append(&disk.copies.short, io)
        disk.copies.engine.unflushed += 1
        return SUBMIT_PENDING
    if io.length > PIECE_BYTES:
        io_list_append(&disk.copies.long, io)
        disk.copies.engine.inflight += 1
        return SUBMIT_PENDING
    if is_copy(io):
        copy_io(io)
    else:
        clear(<uint8_t*>io.engine, io.length)
    return SUBMIT_DONE


cdef inline void fetch_lines(const io_t* io, uint64_t most) noexcept nogil:
    """The first lines of the disk's part. Bound: SHORT_BYTES."""
    cdef uint64_t at = io.engine, end = at + min(io.length, most)
    while at < end:
        if io.operation == IO_READ:
            prefetch_read(<void*>at)
        else:
            prefetch_write(<void*>at)
        at += LINE_BYTES


cdef void copies_flush(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """All short copies of this turn. Bound: those of one poll of each queue."""
    cdef copies_t* copies = <copies_t*>engine
    cdef io_t* io = copies.short.first
    cdef io_t* following
    copies.short.first = NULL
    engine.unflushed = 0
    while io != NULL:
        following = io.link
        if following != NULL:
            fetch_lines(following, READ_AHEAD_BYTES if following.operation == IO_READ
                        else following.length)
        copy_io(io)
        io_complete(io)
        io = following


cdef int copies_poll(engine_t* engine, reactor_t* reactor) noexcept nogil:
    """One piece of the oldest long operation; then it is the next one's turn."""
    cdef copies_t* copies = <copies_t*>engine
    cdef io_t* io = io_list_take(&copies.long)
    if copy_piece(io) if is_copy(io) else clear_piece(io):
        engine.inflight -= 1
        io_complete(io)
    else:
        io_list_append(&copies.long, io)
    return 1


def available_memory():
    """Bytes that can be taken without swapping, as the kernel reckons (proc(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


cdef class CopyEngine(TurnEngine):
    def __init__(self):
        self.serve(&self.raw.engine, copies_poll, copies_flush)


cdef class MallocChannel(Channel):
    def __init__(self, MallocBdev bdev, reactor):
        Channel.__init__(self, bdev, reactor)
        self.copies = engine_of(self.reactor, CopyEngine)
        self.disk.memory = bdev.memory
        self.disk.copies = &self.copies.raw
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

    def open_channel(self, reactor, *bases):
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
