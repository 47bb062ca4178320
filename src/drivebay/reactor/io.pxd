"""io_t: one request on its way, the same struct from the front ends to the engines.

Whoever passes an io_t down may push a frame that is called when it completes;
the frames are a small stack in the io_t itself. Context: reactor.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len

cdef enum:
    IO_READ = 0
    IO_WRITE = 1
    IO_FLUSH = 2
    IO_UNMAP = 3
    IO_WRITE_ZEROES = 4
    IO_OPERATIONS = 5

# io_t.flags
cdef enum:
    IO_FUA = 1              # stable before it completes
    IO_MAY_UNMAP = 2        # zeroes may be a hole

cdef enum:
    SUBMIT_DONE = 0         # io.status is set; no frame was or will be called
    SUBMIT_PENDING = 1      # io_complete() will be called
    SUBMIT_QUEUED = 2       # held at the entry; the same for the caller as PENDING

# What a completion frame answers.
cdef enum:
    FRAME_DONE = 0          # go on with the frame below
    FRAME_TAKEN = 1         # the I/O goes on; io_complete() will be called again

cdef enum:
    IO_FRAMES = 8           # bdev/base counts them when a bdev is put on another
    IO_INLINE_IOVECS = 8

ctypedef int (*frame_fn)(
    io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil

cdef struct frame_t:
    frame_fn fn
    void* context
    uint64_t saved          # whatever fn wants back
    uint64_t stamp          # the same; a tick

cdef struct io_t:
    io_t* link              # for whoever holds the I/O
    void* channel           # where it was submitted (bdev's channel_t)
    iovec* iov
    uint64_t offset         # bytes
    uint64_t length         # bytes
    uint64_t done           # bytes moved so far, the engine's
    uint64_t engine         # the engine's own word
    uint32_t iov_count
    int32_t status          # 0 or -errno
    uint8_t operation
    uint8_t flags
    uint8_t frame_count
    uint32_t flow           # whose it is: queues share a limit fairly
    frame_t frames[IO_FRAMES]

# Linked by io_t.link, oldest first; one that is empty has no first.
cdef struct io_list_t:
    io_t* first
    io_t* last

cdef enum:
    BLOCK_IOVECS = 1088     # 1,024 descriptors, and borders of regions between them

# Borrowed from the reactor by a request with more than IO_INLINE_IOVECS buffers.
cdef struct iovec_block_t:
    iovec_block_t* next
    iovec iov[BLOCK_IOVECS]

cdef inline void io_list_append(io_list_t* found, io_t* io) noexcept nogil:
    io.link = NULL
    if found.first == NULL:
        found.first = io
    else:
        found.last.link = io
    found.last = io

cdef inline io_t* io_list_take(io_list_t* found) noexcept nogil:
    """The oldest, which must be there."""
    cdef io_t* io = found.first
    found.first = io.link
    return io

cdef inline uint32_t io_locate(const io_t* io, uint64_t* skip) noexcept nogil:
    """The buffer in which io.done bytes end, and how many of them lie in it.

    Whoever moves an I/O in parts asks this each time and leaves the list as it is: those
    who completed the I/O read it afterwards.
    """
    cdef uint32_t i = 0
    skip[0] = io.done
    while i < io.iov_count and skip[0] >= io.iov[i].iov_len:
        skip[0] -= io.iov[i].iov_len
        i += 1
    return i

cdef inline void io_push(
    io_t* io, frame_fn fn, void* context, uint64_t saved, uint64_t stamp=0
) noexcept nogil:
    cdef frame_t* frame = &io.frames[io.frame_count]
    frame.fn = fn
    frame.context = context
    frame.saved = saved
    frame.stamp = stamp
    io.frame_count += 1

cdef inline void io_complete(io_t* io) noexcept nogil:
    """Run the frames of an I/O that was pending, top first. Bound: IO_FRAMES."""
    cdef frame_t* frame
    while io.frame_count:
        io.frame_count -= 1
        frame = &io.frames[io.frame_count]
        if frame.fn(io, frame.context, frame.saved, frame.stamp) == FRAME_TAKEN:
            return
