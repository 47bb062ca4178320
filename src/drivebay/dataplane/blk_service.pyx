"""Serving a virtio-blk queue: take a batch, submit, fill, publish once, notify once.

blk_queue_poll is the way in, blk_done the way back, blk_queue_publish what the
guest sees. Context: reactor; never waits, never allocates.
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport UINT32_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from drivebay.bdev.entry cimport bdev_submit
from drivebay.dataplane.blk_request cimport (
    PARSE_BAD, PARSE_ID, PARSE_SUBMIT, blk_request_parse, request_t)
from drivebay.dataplane.coalescing cimport coalescing_hold, coalescing_owes
from drivebay.dataplane.dirty_log cimport dirty_log_host, dirty_log_iovecs
from drivebay.dataplane.ring cimport FAULT_CALL_BLOCKED, POP_CHAIN, token_t, virtqueue_bad
from drivebay.dataplane.virtqueue cimport (
    virtqueue_announce, virtqueue_arm, virtqueue_base, virtqueue_disarm, virtqueue_fill,
    virtqueue_log, virtqueue_look,
    virtqueue_pop, virtqueue_prefetch, virtqueue_publish, virtqueue_seen, virtqueue_take,
    virtqueue_walk, virtqueue_walk_again)
from drivebay.memory.guest_memory cimport memtable_t
from drivebay.memory.platform cimport cpu_pause, exchange_u32
from drivebay.reactor.io cimport (
    FRAME_DONE, IO_FUA, IO_INLINE_IOVECS, IO_READ, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, io_push,
    io_t, iovec)
from drivebay.reactor.mailbox cimport event_raise, message_answer, message_t
from drivebay.reactor.reactor cimport (
    SOURCE_HOT, reactor_detach, reactor_mark_dirty, reactor_notify, reactor_t, source_t)
from drivebay.wire.virtio_blk cimport (
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP)

cdef enum:
    POLL_CHAINS = 32            # of one queue in one poll
    POLL_COPY_BYTES = 262144    # the same, for bdevs that copy
    GATHER_LOOKS = 3
    GATHER_PAUSE_MOST = 63


# --- the way in ----------------------------------------------------------------------------

cdef void blk_queue_break(blk_queue_t* q) noexcept nogil:
    """Give this queue up, once, and only this one; control logs why."""
    if q.broken:
        return
    q.broken = 1
    event_raise(q.reactor.control, &q.event, EVENT_BROKEN)
    if q.err >= 0:
        reactor_notify(q.reactor, q.err)


cdef inline bint is_serving(const blk_queue_t* q) noexcept nogil:
    """A stop lets what an earlier target left go on: the ring is drained then."""
    return q.enabled and not q.broken and (q.stopping == NULL or q.again_left)


cdef inline void announce(blk_queue_t* q) noexcept nogil:
    """Notify the guest of what was published, if it wants that."""
    if virtqueue_announce(&q.vq) and (
            not q.coalescing.base
            or not coalescing_hold(&q.coalescing, q.reactor, q.requests)):
        blk_queue_call(q)


cdef inline void gather(blk_queue_t* q) noexcept nogil:
    """Let a driver that is adding requests finish. Bound: GATHER_LOOKS.

    A poll that takes one chain pays two transfers of cache lines between cores
    for it, so waiting wins if more come at once. Where none did, the next polls go without:
    twice as many each time.
    """
    cdef int i
    cdef uint32_t first = virtqueue_seen(&q.vq), before
    if q.gather_rest:
        q.gather_rest -= 1
        return
    for i in range(GATHER_LOOKS):
        before = virtqueue_seen(&q.vq)
        cpu_pause()
        if virtqueue_look(&q.vq) != POP_CHAIN or (i and virtqueue_seen(&q.vq) == before):
            break
    if virtqueue_seen(&q.vq) != first:
        q.gather_pause = 0
        return
    q.gather_pause = min(2 * q.gather_pause + 1, GATHER_PAUSE_MOST)
    q.gather_rest = q.gather_pause


cdef int blk_queue_poll(source_t* source, reactor_t* reactor) noexcept nogil:
    """Serve one queue once. Bound: POLL_CHAINS or POLL_COPY_BYTES. Returns: chains taken."""
    cdef blk_queue_t* q = <blk_queue_t*>source
    cdef uint64_t bytes = 0
    cdef int taken = 0, count
    if not is_serving(q):
        announce(q)
        return 0
    if q.again_left:                # only then what is new
        announce(q)
        count = min(q.again_left, <uint16_t>POLL_CHAINS)
    else:
        count = see_chains(q)
    while taken < count and bytes < POLL_COPY_BYTES and not q.vq.fault:
        if not take_chain(q, &bytes):
            break
        taken += 1
    if q.vq.fault:
        blk_queue_break(q)
    if taken or q.stopping != NULL:
        blk_queue_publish(source, reactor)
        q.requests += taken
    return taken


cdef inline int see_chains(blk_queue_t* q) noexcept nogil:
    """How many there are for this poll."""
    cdef int count
    cdef int found = virtqueue_look(&q.vq)
    announce(q)
    if found == POP_CHAIN:
        gather(q)
    count = min(virtqueue_seen(&q.vq), <uint32_t>POLL_CHAINS)
    if count > 2:
        virtqueue_prefetch(&q.vq, count)
    return count


cdef bint take_chain(blk_queue_t* q, uint64_t* bytes) noexcept nogil:
    """One chain from the ring to the bdev. False: the ring is bad, or must wait."""
    cdef token_t token
    if not find_chain(q, &token) or not serve_chain(q, &token, bytes):
        return False
    if token.kept:
        q.again += 1
        q.again_left -= 1
    return True


cdef inline bint find_chain(blk_queue_t* q, token_t* token) noexcept nogil:
    """The next one is in q.chain: one that an earlier target did not answer, or a new one."""
    if q.again_left:
        return virtqueue_walk_again(&q.vq, q.table, q.again, token, q.chain) == POP_CHAIN
    return (virtqueue_pop(&q.vq, token) == POP_CHAIN
            and virtqueue_walk(&q.vq, q.table, token, q.chain) == POP_CHAIN)


cdef inline bint serve_chain(blk_queue_t* q, token_t* token, uint64_t* bytes) noexcept nogil:
    """Start or answer the request in q.chain. False: it must wait, and is not taken."""
    cdef request_t request
    cdef int kind = blk_request_parse(q.chain, &q.disk, &request)
    if kind == PARSE_SUBMIT:
        return submit(q, token, &request, bytes)
    virtqueue_take(&q.vq, token)
    if kind == PARSE_BAD:
        q.bad_requests += 1
        virtqueue_fill(&q.vq, token, 0)
    elif kind == PARSE_ID:
        finish_id(q, token, &request)
    else:
        finish(q, q.table, token, request.status_byte, request.status, 1)
    return True


cdef inline void finish(
    blk_queue_t* q, const memtable_t* table, const token_t* token, uint8_t* status_byte,
    uint8_t status, uint32_t written
) noexcept nogil:
    status_byte[0] = status
    if q.log.words != NULL:
        dirty_log_host(&q.log, table, status_byte, 1)
    virtqueue_fill(&q.vq, token, written)


cdef void finish_id(blk_queue_t* q, const token_t* token, request_t* request) noexcept nogil:
    cdef uint32_t written = write_serial(q, request)
    dirty_log_iovecs(&q.log, q.table, request.iov, written)
    finish(q, q.table, token, request.status_byte, VIRTIO_BLK_S_OK, written + 1)


cdef inline void finish_io(
    blk_queue_t* q, const memtable_t* table, const token_t* token, uint8_t* status_byte,
    slot_t* slot
) noexcept nogil:
    """table: the one with which the request was translated."""
    cdef io_t* io = &slot.io
    if q.log.words != NULL and io.operation == IO_READ:     # one that failed wrote some, maybe
        dirty_log_iovecs(&q.log, table, io.iov, io.length)
    finish(q, table, token, status_byte, status_of(io), slot.written if io.status >= 0 else 1)


cdef uint32_t write_serial(blk_queue_t* q, request_t* request) noexcept nogil:
    """virtio 1.3 §5.2.6: up to 20 bytes, NUL-padded, no terminator at 20."""
    cdef uint32_t done = 0, i, part
    for i in range(request.iov_count):
        part = min(<uint32_t>min(<uint64_t>request.iov[i].iov_len, <uint64_t>VIRTIO_BLK_ID_BYTES),
                   VIRTIO_BLK_ID_BYTES - done)
        memcpy(request.iov[i].iov_base, q.serial + done, part)
        done += part
    return done


cdef bint place_iovecs(blk_queue_t* q, slot_t* slot, request_t* request) noexcept nogil:
    """Copy the buffers' list to where it outlives the poll. False: no block is free."""
    slot.io.iov = slot.iov
    if request.iov_count > IO_INLINE_IOVECS:
        if q.reactor.blocks == NULL:
            return False
        slot.block = q.reactor.blocks
        q.reactor.blocks = slot.block.next
        slot.io.iov = slot.block.iov
    memcpy(slot.io.iov, request.iov, request.iov_count * sizeof(iovec))
    slot.io.iov_count = request.iov_count
    return True


cdef bint submit(
    blk_queue_t* q, token_t* token, request_t* request, uint64_t* bytes
) noexcept nogil:
    cdef slot_t* slot = q.free
    cdef io_t* io = &slot.io
    if not place_iovecs(q, slot, request):
        q.reactor.blocks_short = 1  # popped again when a block comes back
        return False
    virtqueue_take(&q.vq, token)
    io.operation = request.operation
    io.flags = request.flags
    if q.write_through and (io.operation == IO_WRITE or io.operation == IO_WRITE_ZEROES):
        io.flags |= IO_FUA
    io.offset = request.offset
    io.length = request.length
    io.frame_count = 0
    io_push(io, blk_done, q, 0)
    slot.written = 1
    if io.operation == IO_READ:     # its type is 32 bits, whatever a guest asks for
        slot.written = <uint32_t>min(request.length + 1, <uint64_t>UINT32_MAX)
    # Off the list before: a submission may complete others, which put theirs back.
    q.free = slot.next
    if bdev_submit(q.channel, io) == SUBMIT_DONE:
        bytes[0] += request.length
        finish_io(q, q.table, token, request.status_byte, slot)
        release_slot(q, slot)
        return True
    slot.status_byte = request.status_byte
    slot.token = token[0]
    slot.table = q.table
    q.source.inflight += 1
    return True


# --- the way back --------------------------------------------------------------------------

cdef inline uint8_t status_of(const io_t* io) noexcept nogil:
    if io.status >= 0:
        return VIRTIO_BLK_S_OK
    return VIRTIO_BLK_S_UNSUPP if io.status == -EOPNOTSUPP else VIRTIO_BLK_S_IOERR


cdef inline void release_slot(blk_queue_t* q, slot_t* slot) noexcept nogil:
    if slot.block != NULL:
        slot.block.next = q.reactor.blocks
        q.reactor.blocks = slot.block
        slot.block = NULL
    slot.next = q.free
    q.free = slot


cdef int blk_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    """The last frame of a request that was pending."""
    cdef blk_queue_t* q = <blk_queue_t*>context
    cdef slot_t* slot = <slot_t*>io
    finish_io(q, slot.table, &slot.token, slot.status_byte, slot)
    if slot.table != q.table:
        q.old_inflight -= 1
    q.source.inflight -= 1
    release_slot(q, slot)
    reactor_mark_dirty(q.reactor, &q.source)
    return FRAME_DONE


cdef void answer_switches(blk_queue_t* q) noexcept nogil:
    """Memory may have changed again before the first change was over: each has its answer."""
    cdef message_t* message = q.switching
    cdef message_t* following
    q.switching = NULL
    while message != NULL:
        following = message.next
        message_answer(message, 0)
        message = following


cdef void blk_queue_call(blk_queue_t* q) noexcept nogil:
    """Notify the guest; the queue of one who blocks us for it is given up."""
    if q.call < 0:
        return
    q.notifications += 1
    reactor_notify(q.reactor, q.call)
    if exchange_u32(&q.reactor.rescued, 0) == <uint32_t>q.call + 1:
        q.call = -1
        virtqueue_bad(&q.vq, FAULT_CALL_BLOCKED, 0)
        blk_queue_break(q)


cdef bint blk_queue_is_drained(const blk_queue_t* q) noexcept nogil:
    """Nothing is in flight, nor left to be submitted again, if that is allowed at all."""
    return q.source.inflight == 0 and not (q.again_left and is_serving(q))


cdef inline void log_ring(blk_queue_t* q) noexcept nogil:
    if q.log_rings:
        virtqueue_log(&q.vq, &q.log, q.table)


cdef void blk_queue_end(blk_queue_t* q) noexcept nogil:
    """Nothing is in flight any more: tell control where the ring stands."""
    cdef message_t* message = q.stopping
    announce(q)
    if coalescing_owes(&q.coalescing, q.reactor):
        blk_queue_call(q)
    reactor_detach(q.reactor, &q.source)
    message_answer(message, virtqueue_base(&q.vq))


cdef void blk_queue_publish(source_t* source, reactor_t* reactor) noexcept nogil:
    """Show the guest what completed, tell it once, and answer control if it waits for that."""
    cdef blk_queue_t* q = <blk_queue_t*>source
    virtqueue_publish(&q.vq)
    log_ring(q)
    if source.state != SOURCE_HOT:      # else the next poll does it, in the next turn
        announce(q)
    if q.switching != NULL and q.old_inflight == 0:
        answer_switches(q)
    if q.stopping != NULL and blk_queue_is_drained(q):
        blk_queue_end(q)


cdef bint blk_queue_arm(source_t* source) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>source
    cdef bint work
    if not is_serving(q):
        return False
    if q.again_left:
        return True
    work = virtqueue_arm(&q.vq)
    log_ring(q)
    return work


cdef void blk_queue_disarm(source_t* source) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>source
    if is_serving(q):
        virtqueue_disarm(&q.vq)
        log_ring(q)
