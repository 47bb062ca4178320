"""Control's side of a virtio-blk queue: the messages that start, stop and change it, and
its Python door. What runs for each request is in blk_service.

The act_* functions run on the reactor, the class in control.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)

from drivebay.bdev.base cimport Channel
from drivebay.dataplane.blk_service cimport (
    EVENT_BROKEN, SLOT_BYTES, blk_queue_arm, blk_queue_break, blk_queue_call, blk_queue_disarm,
    blk_queue_end, blk_queue_is_drained, blk_queue_poll, blk_queue_publish, blk_queue_t, slot_t)
from drivebay.dataplane.coalescing cimport COALESCING_IOPS, coalescing_owes, coalescing_set
from drivebay.dataplane.dirty_log cimport DirtyLog, dirty_log_t
from drivebay.dataplane.inflight cimport InflightQueue
from drivebay.dataplane.packed_virtqueue cimport packed_position
from drivebay.dataplane.ring cimport (
    FAULT_WATCH, chain_t, fault_sentence, virtqueue_bad, virtqueue_t)
from drivebay.dataplane.virtqueue cimport virtqueue_base, virtqueue_bind, virtqueue_set_base
from drivebay.memory.guest_memory cimport MemoryTable, memtable_t
from drivebay.memory.platform cimport CHECK, load_relaxed_u32, load_relaxed_u64
from drivebay.reactor.mailbox cimport Answer, act_fn, answered, message_answer, message_t
from drivebay.reactor.loop cimport SOURCE_ARMED
from drivebay.reactor.reactor cimport (
    reactor_attach, reactor_notify, reactor_rewatch, reactor_t, reactor_wake)
from drivebay.reactor.timer cimport timer_t
from drivebay.wire.virtio_blk cimport VIRTIO_BLK_ID_BYTES
from drivebay.wire.virtio_ring cimport (
    VIRTIO_F_RING_PACKED, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTQ_MAX_SIZE,
    virtq_packed_desc)

from typing import NamedTuple

from drivebay.errors import HostError, PeerError, StateError


# --- messages from control -----------------------------------------------------------------

cdef void send_owed_call(timer_t* timer, void* queue) noexcept nogil:
    """Coalescing held a notification back until now."""
    cdef blk_queue_t* q = <blk_queue_t*>queue
    q.coalescing.next_call = q.reactor.now + q.coalescing.delay
    blk_queue_call(q)


cdef void act_start(message_t* message, void* reactor) noexcept nogil:
    """argument: the base and the threshold of coalescing."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    cdef int status
    q.reactor = <reactor_t*>reactor
    coalescing_set(&q.coalescing, q.reactor, q.requests, message.argument[0],
                   <uint32_t>message.argument[1])
    status = reactor_attach(q.reactor, &q.source)
    if status != 0:
        virtqueue_bad(&q.vq, FAULT_WATCH, -status)
        blk_queue_break(q)
    message_answer(message, status)


cdef void act_stop(message_t* message, void* reactor) noexcept nogil:
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    q.stopping = message
    # What completed earlier in this turn is published first, and that answers then.
    if blk_queue_is_drained(q) and not q.source.dirty:
        blk_queue_end(q)


cdef void act_enable(message_t* message, void* reactor) noexcept nogil:
    """Buffers may already be there, and no kick will come for them."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    q.enabled = <uint8_t>message.argument[0]
    blk_queue_disarm(&q.source)     # it may be HOT since before it was enabled
    reactor_wake(q.reactor, &q.source)
    message_answer(message, 0)


cdef void act_table(message_t* message, void* reactor) noexcept nogil:
    """argument: the table, then host addresses of the ring's areas in it."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    if q.table != <const memtable_t*>message.argument[0]:
        q.old_inflight = q.source.inflight
    q.table = <const memtable_t*>message.argument[0]
    virtqueue_bind(&q.vq, message.argument[1], message.argument[2], message.argument[3])
    if q.old_inflight == 0:
        message_answer(message, 0)
    else:
        message.next = q.switching
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


cdef void act_coalescing(message_t* message, void* reactor) noexcept nogil:
    """argument: the base and the threshold."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    if coalescing_owes(&q.coalescing, q.reactor):
        blk_queue_call(q)
    coalescing_set(&q.coalescing, q.reactor, q.requests, message.argument[0],
                   <uint32_t>message.argument[1])
    message_answer(message, 0)


cdef void act_log(message_t* message, void* reactor) noexcept nogil:
    """argument: the log's words and bits, and whether rings are marked too."""
    cdef blk_queue_t* q = <blk_queue_t*>message.target
    q.log.words = <uint64_t*>message.argument[0]
    q.log.bits = message.argument[1]
    q.log_rings = <uint8_t>message.argument[2]
    message_answer(message, 0)


cdef uint32_t queues_made = 0       # each is a flow of its own to a limit


# --- the Python door -----------------------------------------------------------------------

class QueueCounters(NamedTuple):
    requests: int
    notifications: int
    bad_requests: int
    inflight: int
    polls: int
    busy_polls: int
    busy_ticks: int
    armed: bool


class RingArea(NamedTuple):
    name: str
    length: int
    alignment: int


def ring_areas(int size, bint packed):
    if packed:
        return (RingArea("descriptor ring", 16 * size, 16),
                RingArea("driver event area", 4, 4), RingArea("device event area", 4, 4))
    return (RingArea("descriptor table", 16 * size, 16),
            RingArea("avail ring", 6 + 2 * size, 2), RingArea("used ring", 6 + 8 * size, 4))


cdef class BlkQueue(EventOwner):
    def __init__(
        self, Channel channel, MemoryTable table, *, int index, int size, desc, avail, used,
        base, features, bint readonly, bint write_through, bytes serial, on_broken,
        InflightQueue inflight=None,
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
        self.raw.vq.stride = 1
        self.raw.vq.packed = features >> VIRTIO_F_RING_PACKED & 1
        self.raw.vq.event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1
        self.raw.vq.indirect = features >> VIRTIO_RING_F_INDIRECT_DESC & 1
        self.bind(table)
        self.set_base(base)
        if inflight is not None:
            self.recover(inflight)
        self.raw.disk.readonly = readonly
        self.raw.write_through = write_through
        self.raw.channel = &channel.raw
        self.raw.call = -1
        self.raw.err = -1
        self.raw.event.owner = <void*>self
        self.iops_threshold = COALESCING_IOPS
        self.raw.coalescing.timer.fn = send_owed_call
        self.raw.coalescing.timer.context = &self.raw
        text = serial
        memcpy(self.raw.serial, text, min(len(serial), VIRTIO_BLK_ID_BYTES))
        self.raw.source.poll = blk_queue_poll
        self.raw.source.arm = blk_queue_arm
        self.raw.source.disarm = blk_queue_disarm
        self.raw.source.publish = blk_queue_publish
        self.raw.source.kick = -1
        self.allocate(size)

    cdef int allocate(self, int size) except -1:
        """Slots, the scratch of a walk and the busy heads, in one piece; touched when used."""
        cdef int i
        cdef slot_t* slot
        cdef char* base
        cdef char* scratch
        global queues_made
        CHECK(sizeof(slot_t) <= SLOT_BYTES)
        self.memory_bytes = size * (SLOT_BYTES + sizeof(virtq_packed_desc) + 1) + sizeof(chain_t)
        self.memory = mmap(NULL, self.memory_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise HostError(f"no memory for queue {self.index}", errno)
        base = <char*>self.memory
        scratch = base + size * SLOT_BYTES
        self.raw.chain = <chain_t*>scratch
        self.raw.vq.walked = <virtq_packed_desc*>(scratch + sizeof(chain_t))
        self.raw.vq.busy = <uint8_t*>(self.raw.vq.walked + size)
        for i in range(size - 1, -1, -1):
            slot = <slot_t*>(base + i * SLOT_BYTES)
            slot.io.flow = queues_made
            slot.next = self.raw.free
            self.raw.free = slot
        queues_made += 1
        return 0

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.memory_bytes)

    cdef tuple resolve_rings(self, MemoryTable table):
        """Host addresses of the ring's areas. Raises: PeerError, naming the area."""
        found = []
        for address, area in zip(self.rings, ring_areas(self.raw.vq.size, self.raw.vq.packed)):
            host = table.resolve_user(address, area.length, f"queue {self.index}: {area.name}")
            if host % area.alignment:
                clause = "2.8.10.1" if self.raw.vq.packed else "2.7"
                raise PeerError(f"queue {self.index}: {area.name} at {address:#x} is not "
                                f"{area.alignment}-byte aligned (virtio 1.3 §{clause})")
            found.append(host)
        return tuple(found)

    cdef int bind(self, MemoryTable table) except -1:
        descriptors, driver, device = self.resolve_rings(table)
        self.raw.table = &table.raw
        virtqueue_bind(&self.raw.vq, descriptors, driver, device)
        return 0

    cdef int recover(self, InflightQueue inflight) except -1:
        """Go on where an earlier target was killed, and submit again what it left in flight.

        What SET_VRING_BASE said stands only if nobody has used the region before: a front end
        whose target died does not know how far that had come.
        Raises: PeerError for a region with nonsense in it.
        """
        cdef virtqueue_t* vq = &self.raw.vq
        if vq.packed:
            inflight.recover_packed(vq.ring, vq.size, virtqueue_base(vq))
            if inflight.resumed:
                vq.next_used = packed_position(vq, <uint16_t>(inflight.base >> 16))
                vq.next_avail = vq.next_used + inflight.taken
        else:
            inflight.recover_split(vq.size, vq.next_used, vq.next_avail)
            vq.next_avail = <uint16_t>inflight.base
        vq.avail_seen = vq.next_avail
        vq.published = vq.announced = vq.next_used
        vq.inflight = inflight.raw
        self.inflight = inflight
        self.raw.again = inflight.chains
        self.raw.again_left = inflight.count
        return 0

    cdef int set_base(self, uint32_t base) except -1:
        """Raises: PeerError for one that the ring does not have."""
        cdef virtqueue_t* vq = &self.raw.vq
        if not vq.packed and base > 0xFFFF:
            raise PeerError(
                f"queue {self.index} has base {base:#x} (a split ring's is 16 bits)")
        for position in (base & 0x7FFF, base >> 16 & 0x7FFF):
            if vq.packed and position >= vq.size:
                raise PeerError(
                    f"queue {self.index} has base {base:#x}, which names entry {position} of a "
                    f"packed ring of {vq.size}")
        virtqueue_set_base(vq, base)
        if vq.packed and <uint16_t>(vq.next_avail - vq.next_used) > vq.size:
            raise PeerError(
                f"queue {self.index} has base {base:#x}, which has more in flight than the "
                f"ring's {vq.size} entries")
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
        return self.ask(act_start, None, self.delay_base_us, self.iops_threshold)

    def stop(self):
        if not self.live():
            return answered(virtqueue_base(&self.raw.vq))
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

    def set_log(self, DirtyLog log, bint rings):
        cdef dirty_log_t raw
        raw.words = NULL
        raw.bits = 0
        if log is not None:
            raw = log.raw
        before, self.log = self.log, log
        rings = rings and raw.words != NULL
        if not self.live():
            self.raw.log = raw
            self.raw.log_rings = rings
            return answered(0)
        return self.ask(act_log, (before, log), <uint64_t>raw.words, raw.bits, rings)

    def set_write_through(self, bint write_through):
        if not self.live():
            self.raw.write_through = write_through
            return answered(0)
        return self.ask(act_write_through, None, write_through)

    def set_coalescing(self, uint32_t delay_base_us, uint32_t iops_threshold):
        self.delay_base_us = delay_base_us
        self.iops_threshold = iops_threshold
        if not self.live():
            return answered(0)
        return self.ask(act_coalescing, None, delay_base_us, iops_threshold)

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
            load_relaxed_u64(&self.raw.bad_requests), load_relaxed_u32(&self.raw.source.inflight),
            load_relaxed_u64(&self.raw.source.polls),
            load_relaxed_u64(&self.raw.source.busy_polls),
            load_relaxed_u64(&self.raw.source.busy), self.raw.source.state == SOURCE_ARMED)
