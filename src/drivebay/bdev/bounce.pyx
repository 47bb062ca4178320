"""O_DIRECT wants aligned buffers, guests may bring others: copy through ours.

An I/O larger than a bounce buffer goes in pieces, one after the other. When all
buffers are in use the I/O waits for one; none ever fails for want of a buffer.
Context: reactor.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from drivebay.bdev.base cimport (
    FRAME_DONE, FRAME_TAKEN, IO_READ, SUBMIT_DONE, SUBMIT_PENDING, SUBMIT_QUEUED, bounce_t,
    channel_t, io_complete, io_push, io_t,
)
from drivebay.reactor.io cimport io_list_append, io_list_take


cdef void copy(bounce_t* bounce, bint into_buffer) noexcept nogil:
    """Move bounce.part between the buffer and its place in the caller's iovecs."""
    cdef uint64_t skip = bounce.moved, done = 0, length
    cdef uint32_t i = 0
    cdef char* place
    while done < bounce.part.iov_len:
        if skip >= bounce.iov[i].iov_len:
            skip -= bounce.iov[i].iov_len
            i += 1
            continue
        length = min(<uint64_t>bounce.iov[i].iov_len - skip, bounce.part.iov_len - done)
        place = <char*>bounce.iov[i].iov_base + skip
        if into_buffer:
            memcpy(bounce.buffer + done, place, length)
        else:
            memcpy(place, bounce.buffer + done, length)
        done += length
        skip += length


cdef int next_part(bounce_t* bounce, io_t* io) noexcept nogil:
    """Submit pieces until one is pending. Returns: SUBMIT_DONE or SUBMIT_PENDING."""
    cdef channel_t* channel = <channel_t*>io.channel
    while bounce.moved < bounce.length:
        bounce.part.iov_base = bounce.buffer
        bounce.part.iov_len = min(<uint64_t>BOUNCE_BYTES, bounce.length - bounce.moved)
        io.iov = &bounce.part
        io.iov_count = 1
        io.offset = bounce.offset + bounce.moved
        io.length = bounce.part.iov_len
        io.done = 0
        if io.operation != IO_READ:
            copy(bounce, True)
        io_push(io, part_done, bounce, 0)
        if channel.submit(channel, io) != SUBMIT_DONE:
            return SUBMIT_PENDING
        io.frame_count -= 1
        finish_part(bounce, io)
    return SUBMIT_DONE


cdef void finish_part(bounce_t* bounce, io_t* io) noexcept nogil:
    if io.status < 0:
        bounce.moved = bounce.length
        return
    if io.operation == IO_READ:
        copy(bounce, False)
    bounce.moved += io.length


cdef int part_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    cdef bounce_t* bounce = <bounce_t*>context
    finish_part(bounce, io)
    if next_part(bounce, io) != SUBMIT_DONE:
        return FRAME_TAKEN
    give_back(bounce, io)
    return FRAME_DONE


cdef void give_back(bounce_t* bounce, io_t* io) noexcept nogil:
    """Restore the caller's view, and let the next one that waits have the buffer."""
    cdef channel_t* channel = <channel_t*>io.channel
    cdef io_t* waiting
    io.iov = bounce.iov
    io.iov_count = bounce.iov_count
    io.offset = bounce.offset
    io.length = bounce.length
    if channel.unbounced.first == NULL:
        bounce.next = channel.bounces
        channel.bounces = bounce
    else:
        waiting = io_list_take(&channel.unbounced)
        if start(bounce, waiting) == SUBMIT_DONE:
            io_complete(waiting)


cdef int start(bounce_t* bounce, io_t* io) noexcept nogil:
    bounce.iov = io.iov
    bounce.iov_count = io.iov_count
    bounce.offset = io.offset
    bounce.length = io.length
    bounce.moved = 0
    if next_part(bounce, io) != SUBMIT_DONE:
        return SUBMIT_PENDING
    give_back(bounce, io)
    return SUBMIT_DONE


cdef int bounce_submit(channel_t* channel, io_t* io) noexcept nogil:
    """As channel.submit; QUEUED when all buffers are in use."""
    cdef bounce_t* bounce = channel.bounces
    if bounce == NULL:
        io_list_append(&channel.unbounced, io)
        return SUBMIT_QUEUED
    channel.bounces = bounce.next
    return start(bounce, io)
