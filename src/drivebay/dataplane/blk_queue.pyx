"""Serving a virtio-blk queue: take a batch, submit, fill, publish once, notify once.

blk_queue_poll is the way in, blk_done the way back, blk_queue_publish what the
guest sees. The act_* functions are how control starts, stops and changes a
queue; the class at the end is its Python door.
"""

from libc.errno cimport EOPNOTSUPP, errno
from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)

from drivebay.bdev.base cimport Channel
from drivebay.bdev.entry cimport bdev_submit
from drivebay.dataplane.blk_request cimport (
    PARSE_BAD, PARSE_ID, PARSE_SUBMIT, blk_request_parse, request_t)
from drivebay.dataplane.virtqueue cimport (
    FAULT_CALL_BLOCKED, FAULT_HEAD_TWICE, FAULT_WATCH, POP_CHAIN, fault_sentence, virtqueue_arm,
    virtqueue_bad, virtqueue_disarm, virtqueue_fill, virtqueue_look, virtqueue_pop,
    virtqueue_prefetch, virtqueue_publish, virtqueue_walk)
from drivebay.memory.guest_memory cimport MemoryTable, memtable_t
from drivebay.memory.platform cimport (
    CHECK, cpu_pause, exchange_u32, load_relaxed_u32, load_relaxed_u64, tsc_read)
from drivebay.reactor.clock cimport ticks_per_second
from drivebay.reactor.io cimport (
    FRAME_DONE, IO_FUA, IO_INLINE_IOVECS, IO_READ, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, io_push,
    io_t, iovec)
from drivebay.reactor.mailbox cimport (
    Answer, act_fn, answered, event_raise, message_answer, message_t)
from drivebay.reactor.reactor cimport (
    reactor_attach, reactor_detach, reactor_mark_dirty, reactor_notify, reactor_rewatch, reactor_t,
    reactor_wake, source_t)
from drivebay.wire.virtio_blk cimport (
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP)
from drivebay.wire.virtio_ring cimport (
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTQ_MAX_SIZE, virtq_avail, virtq_desc,
    virtq_used)

from typing import NamedTuple

from drivebay.errors import HostError, PeerError, StateError

cdef enum:
    POLL_CHAINS = 32            # of one queue in one poll
    POLL_COPY_BYTES = 262144    # the same, for bdevs that copy
    GATHER_LOOKS = 3
    GATHER_BELOW_NS = 250       # a request cheaper than this is worth a wait for the next
    EVENT_BROKEN = 1            # what an event of a queue says


# --- the way in ----------------------------------------------------------------------------

cdef void blk_queue_break(blk_queue_t* q) noexcept nogil:
    """Give this queue up, and only this one; control logs why."""
    q.broken = 1
    event_raise(q.reactor.control, &q.event, EVENT_BROKEN)
    if q.err >= 0:
        reactor_notify(q.reactor, q.err)


cdef inline bint is_serving(const blk_queue_t* q) noexcept nogil:
    return q.enabled and not q.broken and q.stopping == NULL


cdef inline void gather(blk_queue_t* q) noexcept nogil:
    """Let a driver that is adding requests finish. Bound: GATHER_LOOKS.

    A poll that takes one chain pays two transfers of cache lines between cores
    for it; when a request costs less than that, waiting wins.
    """
    cdef int i
    cdef uint16_t before
    if q.cost > q.gather_below:
        return
    for i in range(GATHER_LOOKS):
        before = q.vq.avail_seen
        cpu_pause()
        if virtqueue_look(&q.vq) != POP_CHAIN or (i and q.vq.avail_seen == before):
            return


cdef int blk_queue_poll(source_t* source, reactor_t* reactor) noexcept nogil:
    """Serve one queue once. Bound: POLL_CHAINS or POLL_COPY_BYTES. Returns: chains taken."""
    cdef blk_queue_t* q = <blk_queue_t*>source
    cdef uint64_t bytes = 0
    cdef int taken = 0, count
    if not is_serving(q):
        return 0
    if virtqueue_look(&q.vq) == POP_CHAIN:
        gather(q)
    count = min(<uint16_t>(q.vq.avail_seen - q.vq.next_avail), <uint16_t>POLL_CHAINS)
    if count > 2:
        virtqueue_prefetch(&q.vq, count)
    while taken < count and bytes < POLL_COPY_BYTES and not q.vq.fault:
        if not take_chain(q, &bytes):
            break
        taken += 1
    if taken:
        blk_queue_publish(source, reactor)
        q.requests += taken
        q.cost = <uint32_t>((tsc_read() - reactor.now) // taken)
    if q.vq.fault and not q.broken:
        blk_queue_break(q)
    return taken


cdef bint take_chain(blk_queue_t* q, uint64_t* bytes) noexcept nogil:
    """One chain from the ring to the bdev. False: the ring is bad, or must wait."""
    cdef uint16_t head = 0
    cdef request_t request
    cdef int kind
    if virtqueue_pop(&q.vq, &head) != POP_CHAIN:
        return False
    if q.head_busy[head]:
        virtqueue_bad(&q.vq, FAULT_HEAD_TWICE, head)
        return False
    if virtqueue_walk(&q.vq, q.table, head, q.chain) != POP_CHAIN:
        return False
    kind = blk_request_parse(q.chain, &q.disk, &request)
    if kind == PARSE_SUBMIT:
        return submit(q, head, &request, bytes)
    if kind == PARSE_BAD:
        q.bad_requests += 1
        virtqueue_fill(&q.vq, head, 0)
    elif kind == PARSE_ID:
        finish(q, head, request.status_byte, VIRTIO_BLK_S_OK, write_serial(q, &request) + 1)
    else:
        finish(q, head, request.status_byte, request.status, 1)
    return True


cdef inline void finish(
    blk_queue_t* q, uint16_t head, uint8_t* status_byte, uint8_t status, uint32_t written
) noexcept nogil:
    status_byte[0] = status
    virtqueue_fill(&q.vq, head, written)


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


cdef bint submit(blk_queue_t* q, uint16_t head, request_t* request, uint64_t* bytes) noexcept nogil:
    cdef slot_t* slot = q.free
    cdef io_t* io = &slot.io
    if not place_iovecs(q, slot, request):
        q.vq.next_avail -= 1        # taken again when a block comes back
        q.reactor.blocks_short = 1
        return False
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
        finish(q, head, request.status_byte, status_of(io), slot.written if io.status >= 0 else 1)
        release_slot(q, slot)
        return True
    slot.status_byte = request.status_byte
    slot.head = head
    slot.generation = q.table.generation
    q.head_busy[head] = 1
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


cdef int blk_done(io_t* io, void* context, uint64_t saved) noexcept nogil:
    """The last frame of a request that was pending."""
    cdef blk_queue_t* q = <blk_queue_t*>context
    cdef slot_t* slot = <slot_t*>io
    finish(q, slot.head, slot.status_byte, status_of(io), slot.written if io.status >= 0 else 1)
    q.head_busy[slot.head] = 0
    q.source.inflight -= 1
    if slot.generation != q.table.generation:
        q.old_inflight -= 1
    release_slot(q, slot)
    reactor_mark_dirty(q.reactor, &q.source)
    return FRAME_DONE


cdef void blk_queue_publish(source_t* source, reactor_t* reactor) noexcept nogil:
    """Show the guest what completed, tell it once, and answer control if it waits for that."""
    cdef blk_queue_t* q = <blk_queue_t*>source
    if virtqueue_publish(&q.vq) and q.call >= 0:
        q.notifications += 1
        reactor_notify(reactor, q.call)
        if exchange_u32(&reactor.rescued, 0) == <uint32_t>q.call + 1:
            q.call = -1
            virtqueue_bad(&q.vq, FAULT_CALL_BLOCKED, 0)
            blk_queue_break(q)
    if q.switching != NULL and q.old_inflight == 0:
        message_answer(q.switching, 0)
        q.switching = NULL
    if q.stopping != NULL and q.source.inflight == 0:
        stop_now(q)


cdef bint blk_queue_arm(source_t* source) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>source
    return is_serving(q) and virtqueue_arm(&q.vq)


cdef void blk_queue_disarm(source_t* source) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>source
    if is_serving(q):
        virtqueue_disarm(&q.vq)


# --- messages from control -----------------------------------------------------------------

cdef void act_start(message_t* message, void* reactor) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    cdef int status
    q.reactor = <reactor_t*>reactor
    status = reactor_attach(q.reactor, &q.source)
    if status != 0:
        virtqueue_bad(&q.vq, FAULT_WATCH, -status)
        blk_queue_break(q)
    message_answer(message, status)


cdef void stop_now(blk_queue_t* q) noexcept nogil:
    cdef message_t* message = q.stopping
    reactor_detach(q.reactor, &q.source)
    message_answer(message, q.vq.next_avail)


cdef void act_stop(message_t* message, void* reactor) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    q.stopping = message
    # What completed earlier in this turn is published first, and that answers then.
    if q.source.inflight == 0 and not q.source.dirty:
        stop_now(q)


cdef void act_enable(message_t* message, void* reactor) noexcept nogil:
    """Buffers may already be there, and no kick will come for them."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    q.enabled = <uint8_t>message.argument[0]
    blk_queue_disarm(&q.source)     # it may be HOT since before it was enabled
    reactor_wake(q.reactor, &q.source)
    message_answer(message, 0)


cdef void act_table(message_t* message, void* reactor) noexcept nogil:
    """argument: the table, then host addresses of desc, avail and used in it."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    if q.table != <const memtable_t*>message.argument[0]:
        q.old_inflight = q.source.inflight
    q.table = <const memtable_t*>message.argument[0]
    q.vq.desc = <virtq_desc*>message.argument[1]
    q.vq.avail = <virtq_avail*>message.argument[2]
    q.vq.used = <virtq_used*>message.argument[3]
    if q.old_inflight == 0:
        message_answer(message, 0)
    else:
        q.switching = message


cdef void act_notifiers(message_t* message, void* reactor) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    cdef int status = 0, kick = <int>message.argument[0]
    if <int>message.argument[1] >= 0 and <int>message.argument[1] != q.call:
        # What completed before may have rung nobody; one call too many does no harm.
        reactor_notify(q.reactor, <int>message.argument[1])
    q.call = <int>message.argument[1]
    q.err = <int>message.argument[2]
    if kick != q.source.kick:
        status = reactor_rewatch(q.reactor, &q.source, kick)
    message_answer(message, status)


cdef void act_write_through(message_t* message, void* reactor) noexcept nogil:
    (<blk_queue_t*>message.target).write_through = <uint8_t>message.argument[0]
    message_answer(message, 0)


# --- the Python door -----------------------------------------------------------------------

class QueueCounters(NamedTuple):
    requests: int
    notifications: int
    bad_requests: int
    inflight: int


cdef class BlkQueue(EventOwner):
    def __init__(
        self, Channel channel, MemoryTable table, *, int index, int size, desc, avail, used,
        int next_avail, features, bint readonly, bint write_through, bytes serial, on_broken,
    ):
        cdef uint8_t* text
        if size <= 0 or size & (size - 1) or size > VIRTQ_MAX_SIZE:
            raise PeerError(
                f"queue {index} has a ring of {size} entries; it must be a power of two, "
                f"at most {VIRTQ_MAX_SIZE}")
        self.index = index
        self.channel = channel
        self.table = table
        self.on_broken = on_broken
        self.rings = (desc, avail, used)
        self.raw.vq.size = size
        self.raw.vq.mask = size - 1
        self.bind(table)
        self.raw.vq.next_avail = self.raw.vq.avail_seen = next_avail
        self.raw.vq.next_used = self.raw.vq.published = self.raw.vq.used.idx
        self.raw.vq.event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1
        self.raw.vq.indirect = features >> VIRTIO_RING_F_INDIRECT_DESC & 1
        self.raw.disk.readonly = readonly
        self.raw.write_through = write_through
        self.raw.channel = &channel.raw
        self.raw.call = -1
        self.raw.err = -1
        self.raw.event.owner = <void*>self
        self.raw.gather_below = GATHER_BELOW_NS * ticks_per_second() // 1_000_000_000
        text = serial
        memcpy(self.raw.serial, text, min(len(serial), VIRTIO_BLK_ID_BYTES))
        self.raw.source.poll = blk_queue_poll
        self.raw.source.arm = blk_queue_arm
        self.raw.source.disarm = blk_queue_disarm
        self.raw.source.publish = blk_queue_publish
        self.raw.source.kick = -1
        self.allocate(size)

    cdef int allocate(self, int size) except -1:
        """Slots, the chain's scratch and the busy heads, in one piece; touched when used."""
        cdef int i
        cdef slot_t* slot
        cdef char* base
        CHECK(sizeof(slot_t) <= SLOT_BYTES)
        self.memory_bytes = size * SLOT_BYTES + size + sizeof(chain_t)
        self.memory = mmap(NULL, self.memory_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise HostError(f"no memory for queue {self.index}", errno)
        base = <char*>self.memory
        self.raw.chain = <chain_t*>(base + size * SLOT_BYTES)
        self.raw.head_busy = <uint8_t*>base + size * SLOT_BYTES + sizeof(chain_t)
        for i in range(size - 1, -1, -1):
            slot = <slot_t*>(base + i * SLOT_BYTES)
            slot.next = self.raw.free
            self.raw.free = slot
        return 0

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.memory_bytes)

    cdef tuple resolve_rings(self, MemoryTable table):
        """Host addresses of the three rings. Raises: PeerError, naming the ring."""
        size = self.raw.vq.size
        found = []
        for name, address, length, alignment in zip(
                ("descriptor table", "avail ring", "used ring"), self.rings,
                (16 * size, 6 + 2 * size, 6 + 8 * size), (16, 2, 4)):
            host = table.resolve_user(address, length, f"queue {self.index}: {name}")
            if host % alignment:
                raise PeerError(f"queue {self.index}: {name} at {address:#x} is not "
                                f"{alignment}-byte aligned (virtio 1.3 §2.7)")
            found.append(host)
        return tuple(found)

    cdef int bind(self, MemoryTable table) except -1:
        desc, avail, used = self.resolve_rings(table)
        self.raw.table = &table.raw
        self.raw.vq.desc = <virtq_desc*><uint64_t>desc
        self.raw.vq.avail = <virtq_avail*><uint64_t>avail
        self.raw.vq.used = <virtq_used*><uint64_t>used
        return 0

    cdef Answer ask(
        self, act_fn act, object keep, uint64_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0
    ):
        return self.channel.reactor.ask(act, &self.raw, (self, keep), a, b, c, d)

    cdef bint live(self) noexcept:
        return self.started and not self.stopped

    def start(self, int kick, int call, int err):
        if self.started:
            raise StateError(f"queue {self.index} was started already")
        self.started = True
        self.raw.source.kick = kick
        self.raw.call = call
        self.raw.err = err
        return self.ask(act_start, None)

    def stop(self):
        if not self.live():
            return answered(self.raw.vq.next_avail)
        self.stopped = True
        return self.ask(act_stop, None)

    def set_enabled(self, bint enabled):
        if not self.live():
            self.raw.enabled = enabled
            return answered(0)
        return self.ask(act_enable, None, enabled)

    def set_table(self, MemoryTable table):
        desc, avail, used = self.resolve_rings(table)
        before, self.table = self.table, table
        if not self.live():
            self.bind(table)
            return answered(0)
        return self.ask(act_table, (before, table), <uint64_t>&table.raw, desc, avail, used)

    def set_notifiers(self, int kick, int call, int err):
        if not self.live():
            self.raw.source.kick = kick
            self.raw.call = call
            self.raw.err = err
            return answered(0)
        return self.ask(act_notifiers, None, <uint64_t>kick, <uint64_t>call, <uint64_t>err)

    def set_write_through(self, bint write_through):
        if not self.live():
            self.raw.write_through = write_through
            return answered(0)
        return self.ask(act_write_through, None, write_through)

    cdef int on_event(self, uint32_t bits) except -1:
        if bits & EVENT_BROKEN:
            self.on_broken(self)
        return 0

    @property
    def broken(self):
        if not self.raw.broken:
            return None
        return fault_sentence(self.raw.vq.fault, self.raw.vq.fault_value)

    def counters(self):
        return QueueCounters(
            load_relaxed_u64(&self.raw.requests), load_relaxed_u64(&self.raw.notifications),
            load_relaxed_u64(&self.raw.bad_requests), load_relaxed_u32(&self.raw.source.inflight))
