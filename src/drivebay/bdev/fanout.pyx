"""Children of one I/O. Nothing here is allocated on the path, and nothing waits.

Context: reactor; the class is made in a worker thread, before its channel is.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.base cimport (
    FRAME_TAKEN, SUBMIT_DONE, SUBMIT_PENDING, SUBMIT_QUEUED, channel_t, io_complete, io_push, io_t,
)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.reactor.io cimport (
    IO_INLINE_IOVECS, io_list_append, io_list_take, iovec_block_t)

from drivebay.errors import HostError


cdef int fan_out(fanout_t* fanout, io_t* parent, const fan_ops_t* ops) noexcept nogil:
    """As channel.submit."""
    cdef fan_t* fan = free_fan(fanout)
    if fan == NULL:
        parent.engine = <uint64_t>ops
        io_list_append(&fanout.waiting, parent)
        return SUBMIT_QUEUED
    fanout.fans = fan.next
    fan.parent = parent
    fan.fanout = fanout
    fan.ops = ops
    fan.status = 0
    fan.position = 0
    fan.word = 0
    fan.outstanding = 1     # ours, until all children are made
    if not send(fan):
        return SUBMIT_PENDING
    end(fan)
    return SUBMIT_DONE


cdef inline fan_t* free_fan(fanout_t* fanout) noexcept nogil:
    """The first of the list, which may be a new one; NULL when all are in use."""
    if fanout.fans == NULL and fanout.new_fan_count:
        fanout.new_fan_count -= 1
        fanout.fans = &fanout.new_fans[fanout.new_fan_count]
    return fanout.fans


cdef inline child_t* free_child(fanout_t* fanout) noexcept nogil:
    """The same of children."""
    if fanout.children == NULL and fanout.new_child_count:
        fanout.new_child_count -= 1
        fanout.children = &fanout.new_children[fanout.new_child_count]
    return fanout.children


cdef bint send(fan_t* fan) noexcept nogil:
    """Make and submit children. Returns: are all made, and back?"""
    cdef fanout_t* fanout = fan.fanout
    cdef child_t* child
    cdef channel_t* base
    fanout.blockless = False
    while True:
        child = free_child(fanout)
        if child == NULL:
            starve(fan)
            return False
        child.fan = fan
        child.block = NULL
        child.io.operation = fan.parent.operation
        child.io.flags = fan.parent.flags
        child.io.flow = fan.parent.flow
        child.io.frame_count = 0
        child.io.iov_count = 0
        base = fan.ops.next_child(fanout.channel, fan, child)
        if base == NULL:
            if fanout.blockless:
                starve(fan)
                return False
            break
        fanout.children = child.next
        fan.outstanding += 1
        io_push(&child.io, child_done, child, 0)
        if bdev_submit(base, &child.io) == SUBMIT_DONE:
            join(child)
    fan.outstanding -= 1
    return fan.outstanding == 0


cdef void starve(fan_t* fan) noexcept nogil:
    cdef fanout_t* fanout = fan.fanout
    fan.next = NULL
    if fanout.starved == NULL:
        fanout.starved = fan
    else:
        fanout.starved_last.next = fan
    fanout.starved_last = fan


cdef void join(child_t* child) noexcept nogil:
    """A child is back: its fan knows, and whoever is next may have it."""
    cdef fan_t* fan = child.fan
    cdef fanout_t* fanout = fan.fanout
    fan.outstanding -= 1
    if fan.ops.joined != NULL:
        fan.ops.joined(fanout.channel, fan, child)
    elif child.io.status < 0 and fan.status == 0:
        fan.status = child.io.status
    if child.block != NULL:
        give_block(fanout, child.block)
    child.next = fanout.children
    fanout.children = child


cdef int child_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    cdef fan_t* fan = (<child_t*>context).fan
    cdef fanout_t* fanout = fan.fanout
    join(<child_t*>context)
    if fan.outstanding == 0:
        complete(fan)
    while fanout.starved != NULL and fanout.children != NULL:
        fan = fanout.starved
        fanout.starved = fan.next
        if send(fan):
            complete(fan)
        if fanout.blockless:    # one that has the block is still to come back
            break
    return FRAME_TAKEN          # the child may be another fan's already: hands off


cdef void end(fan_t* fan) noexcept nogil:
    """The parent has its status, the record is free."""
    cdef fanout_t* fanout = fan.fanout
    if fan.ops.ended != NULL:
        fan.ops.ended(fanout.channel, fan)
    fan.parent.status = fan.status
    fan.next = fanout.fans
    fanout.fans = fan


cdef void complete(fan_t* fan) noexcept nogil:
    cdef fanout_t* fanout = fan.fanout
    cdef io_t* parent = fan.parent
    end(fan)
    io_complete(parent)
    while fanout.fans != NULL and fanout.waiting.first != NULL:
        parent = io_list_take(&fanout.waiting)
        if fan_out(fanout, parent, <const fan_ops_t*>parent.engine) == SUBMIT_DONE:
            io_complete(parent)


# --- buffers -------------------------------------------------------------------------------

cdef iovec_block_t* take_block(fanout_t* fanout) noexcept nogil:
    cdef iovec_block_t* block = fanout.channel.reactor.blocks
    if block != NULL:
        fanout.channel.reactor.blocks = block.next
        return block
    if fanout.own_lent:
        return NULL
    fanout.own_lent = True
    return fanout.own


cdef void give_block(fanout_t* fanout, iovec_block_t* block) noexcept nogil:
    if block == fanout.own:
        fanout.own_lent = False
        return
    block.next = fanout.channel.reactor.blocks
    fanout.channel.reactor.blocks = block


cdef bint child_slice(child_t* child, uint64_t start, uint64_t length) noexcept nogil:
    """Give a child the parent's buffers from ``start`` on, for ``length`` bytes.

    Returns: did it get them? Without a block for many of them it did not. Bound: the parent's
    buffers.
    """
    cdef const io_t* parent = child.fan.parent
    cdef uint32_t first = 0, last
    cdef uint64_t skip = start, left
    if parent.iov_count == 0:
        return True
    while skip >= parent.iov[first].iov_len:
        skip -= parent.iov[first].iov_len
        first += 1
    last = first
    left = skip + length
    while left > parent.iov[last].iov_len:
        left -= parent.iov[last].iov_len
        last += 1
    child.io.iov_count = last - first + 1
    child.io.iov = child.iov
    if child.io.iov_count > IO_INLINE_IOVECS:
        child.block = take_block(child.fan.fanout)
        if child.block == NULL:
            child.fan.fanout.blockless = True
            return False
        child.io.iov = child.block.iov
    for last in range(child.io.iov_count):
        child.io.iov[last] = parent.iov[first + last]
    child.io.iov[child.io.iov_count - 1].iov_len = left
    child.io.iov[0].iov_base = <char*>child.io.iov[0].iov_base + skip
    child.io.iov[0].iov_len -= skip
    return True


cdef class Fanout:
    """The lists of one channel; untouched until used, so they cost address space only."""

    def __init__(self):
        self.memory_bytes = (CHILDREN * sizeof(child_t) + FANS * sizeof(fan_t)
                             + sizeof(iovec_block_t))
        self.memory = mmap(NULL, self.memory_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise HostError("no memory for the parts of requests that go to several bdevs", ENOMEM)
        self.raw.new_children = <child_t*>self.memory
        self.raw.new_child_count = CHILDREN
        self.raw.new_fans = <fan_t*>&self.raw.new_children[CHILDREN]
        self.raw.new_fan_count = FANS
        self.raw.own = <iovec_block_t*>&self.raw.new_fans[FANS]

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.memory_bytes)
