"""The bdev and its channels, control's side. Context: control, except the act_* functions.

A channel opens in two steps: open_channel() allocates in a worker thread and may
fail; activate() hands it to its reactor and cannot. gate(), ungate() and
remove() are how control quiesces a bdev: each is answered when nothing of it is
in flight on that reactor any more.
"""

from libc.errno cimport EFAULT, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.bounce cimport BOUNCE_BYTES, BOUNCE_COUNT
from drivebay.bdev.entry cimport (
    channel_drained, channel_let_pass, channel_limits_changed, channel_release_held)
from drivebay.bdev.qos cimport QOS_SHARES, qos_set
from drivebay.memory.platform cimport (
    load_relaxed_u32, load_relaxed_u64, store_release_u32, store_relaxed_u64)
from drivebay.reactor.mailbox cimport Answer, answered, message_answer, message_t
from drivebay.reactor.io cimport IO_FRAMES
from drivebay.reactor.reactor cimport Reactor, reactor_t

from typing import NamedTuple
from uuid import uuid4

from drivebay.errors import HostError, UsageError

OPERATIONS = ("read", "write", "flush", "unmap", "write_zeroes")
NAME_LIMIT = 256


class OpStats(NamedTuple):
    ops: int
    bytes: int
    errors: int
    latency_ticks: int
    max_latency_ticks: int
    min_latency_ticks: int

    def plus(self, other):
        return OpStats(
            self.ops + other.ops, self.bytes + other.bytes, self.errors + other.errors,
            self.latency_ticks + other.latency_ticks,
            max(self.max_latency_ticks, other.max_latency_ticks),
            min((ticks for ticks in (self.min_latency_ticks, other.min_latency_ticks) if ticks),
                default=0))

    def cleared(self, mode):
        """Without what bdev_reset_iostat's mode forgets: all, maxmin or error."""
        if mode == "all":
            return NO_STATS
        if mode == "error":
            return self._replace(errors=0)
        return self._replace(max_latency_ticks=0, min_latency_ticks=0)


NO_STATS = OpStats(0, 0, 0, 0, 0, 0)
cdef uint64_t NEVER = <uint64_t>-1

cdef enum:
    FRONT_END_FRAMES = 1
    MOST_DEPTH = 64         # far more than anybody needs; bdev/entry counts up to 255


# --- on the reactor ------------------------------------------------------------------------

cdef channel_t* channel_of(message_t* message) noexcept nogil:
    return <channel_t*>message.target


cdef void act_activate(message_t* message, void* reactor) noexcept nogil:
    cdef channel_t* channel = channel_of(message)
    channel.reactor = <reactor_t*>reactor
    if channel.enter != NULL:
        channel.enter(channel)
    message_answer(message, 0)


cdef void answer_when_drained(message_t* message) noexcept nogil:
    cdef channel_t* channel = channel_of(message)
    message.next = channel.draining
    channel.draining = message
    if channel.inflight == 0:
        channel_drained(channel)


cdef void act_gate(message_t* message, void* reactor) noexcept nogil:
    channel_of(message).flags |= CHANNEL_GATED
    answer_when_drained(message)


cdef void act_ungate(message_t* message, void* reactor) noexcept nogil:
    channel_of(message).flags &= ~<unsigned int>CHANNEL_GATED
    channel_release_held(channel_of(message))
    message_answer(message, 0)


cdef void act_remove(message_t* message, void* reactor) noexcept nogil:
    channel_of(message).flags |= CHANNEL_REMOVED
    channel_of(message).flags &= ~<unsigned int>CHANNEL_GATED
    channel_release_held(channel_of(message))
    answer_when_drained(message)


cdef void act_close(message_t* message, void* reactor) noexcept nogil:
    channel_of(message).flags = CHANNEL_REMOVED | CHANNEL_CLOSING
    channel_release_held(channel_of(message))
    answer_when_drained(message)


cdef void act_limit(message_t* message, void* reactor) noexcept nogil:
    """argument: the limits a second."""
    cdef channel_t* channel = channel_of(message)
    channel.flags &= ~<unsigned int>CHANNEL_LIMITED
    if qos_set(channel.throttle, message.argument, (<reactor_t*>reactor).ticks_a_second):
        channel.flags |= CHANNEL_LIMITED
    channel_limits_changed(channel)
    message_answer(message, 0)


cdef void act_histogram(message_t* message, void* reactor) noexcept nogil:
    channel_of(message).histogram = <histogram_t*>message.argument[0]
    message_answer(message, 0)


# --- control -------------------------------------------------------------------------------

cdef class Channel:
    def __init__(self, Bdev bdev, Reactor reactor):
        cdef int i
        self.bdev = bdev
        self.reactor = reactor
        self.raw.bdev = &bdev.raw
        self.raw.reactor = &reactor.raw
        for i in range(IO_OPERATIONS):
            self.raw.stats[i].min_ticks = NEVER
        if bdev.raw.buffer_mask:
            self.allocate_bounces()

    cdef int allocate_bounces(self) except -1:
        """Untouched until used, so it costs address space only."""
        cdef int i
        cdef bounce_t* bounces
        self.bounce_memory = mmap(NULL, BOUNCE_COUNT * (BOUNCE_BYTES + sizeof(bounce_t)),
                                  PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.bounce_memory == MAP_FAILED:
            self.bounce_memory = NULL
            raise HostError(f"no memory for the bounce buffers of bdev '{self.bdev.name}'", ENOMEM)
        bounces = <bounce_t*>(<char*>self.bounce_memory + BOUNCE_COUNT * BOUNCE_BYTES)
        for i in range(BOUNCE_COUNT):
            bounces[i].buffer = <unsigned char*>self.bounce_memory + i * BOUNCE_BYTES
            bounces[i].next = self.raw.bounces
            self.raw.bounces = &bounces[i]
        return 0

    def __dealloc__(self):
        if self.bounce_memory != NULL:
            munmap(self.bounce_memory, BOUNCE_COUNT * (BOUNCE_BYTES + sizeof(bounce_t)))
        free(self.raw.throttle)

    cdef Answer ask(self, void (*act)(message_t*, void*) noexcept nogil):
        if not self.active:
            return answered(0)
        return self.reactor.ask(act, &self.raw, self)

    def activate(self):
        self.active = True
        self.bdev.channels.add(self)
        answer = self.ask(act_activate)
        if self.bdev.rates is not None:
            self.limit(self.bdev.rates)
        if self.bdev.layout is not None:
            self.count_times(self.bdev.layout)
        return answer

    def limit(self, rates):
        if self.raw.throttle == NULL:
            share = self.bdev.share_of(self.reactor.core)
            self.raw.throttle = <throttle_t*>calloc(1, sizeof(throttle_t))
            if self.raw.throttle == NULL:
                raise MemoryError(f"no memory for the limits of bdev '{self.bdev.name}'")
            self.raw.throttle.budget = self.bdev.budget
            self.raw.throttle.share = &self.bdev.budget.shares[share]
            self.raw.throttle.timer.fn = channel_let_pass
            self.raw.throttle.timer.context = &self.raw
        ios, moved, read, written = rates
        return self.reactor.ask(act_limit, &self.raw, self, ios, moved, read, written)

    def count_times(self, layout):
        before = self.histogram
        self.histogram = None if layout is None else Histogram(layout)
        return self.reactor.ask(
            act_histogram, &self.raw, (self, before, self.histogram),
            0 if layout is None else <uint64_t>&self.histogram.raw)

    def gate(self):
        return self.ask(act_gate)

    def ungate(self):
        return self.ask(act_ungate)

    def set_base(self, index, channel):
        raise NotImplementedError(f"{self.bdev.product_name} has no bases that change")

    def remove(self):
        return self.ask(act_remove)

    def close(self):
        answer = self.ask(act_close)
        self.bdev.channels.discard(self)
        self.bdev.keep_stats(self.stats())
        if self.histogram is not None:
            self.bdev.closed_histogram.add(self.histogram)
        return answer

    def stats(self):
        cdef int i
        cdef op_stats_t* s
        out = {}
        for i in range(IO_OPERATIONS):
            s = &self.raw.stats[i]
            least = s.min_ticks
            # A flush moves nothing, though it may have the length of the write it follows.
            out[OPERATIONS[i]] = OpStats(s.ops, 0 if i == IO_FLUSH else s.bytes, s.errors,
                                         s.ticks, s.max_ticks, 0 if least == NEVER else least)
        return out

    def clear_stats(self, mode):
        """Racy by a few I/Os that complete meanwhile, as counters are."""
        cdef int i
        cdef op_stats_t* s
        for i in range(IO_OPERATIONS):
            s = &self.raw.stats[i]
            if mode == "all":
                s[0] = op_stats_t(0, 0, 0, 0, 0, NEVER)
            elif mode == "error":
                s.errors = 0
            else:
                s.max_ticks = 0
                s.min_ticks = NEVER


cdef uint32_t frames_below(Bdev base) noexcept:
    """Those that an I/O needs from a bdev on down, the entry's included."""
    if base.bases:
        return base.raw.frames
    # A bounce buffer's, or the one that waits for the flush behind a write.
    return 2 if base.raw.buffer_mask or base.raw.flags & BDEV_VOLATILE_CACHE else 1


cdef class Bdev:
    def __init__(self, str name, uuid, int block_size, num_blocks):
        if not name or len(name.encode(errors="replace")) >= NAME_LIMIT or not name.isprintable():
            raise UsageError(
                f"bdev name {name[:40]!r} must have 1 to {NAME_LIMIT - 1} bytes, all printable",
                field="name")
        if block_size < 512 or block_size & (block_size - 1) or block_size > 65536:
            raise UsageError(
                f"block size {block_size} is not a power of two from 512 to 65536",
                field="block_size")
        if num_blocks <= 0 or num_blocks * block_size >= 1 << 63:
            raise UsageError(f"{num_blocks} blocks of {block_size} bytes is no size of a disk",
                             field="num_blocks")
        self.name = name
        self.uuid = uuid if uuid is not None else uuid4()
        self.aliases = []
        self.bases = []
        self.channels = set()
        self.closed_stats = dict.fromkeys(OPERATIONS, NO_STATS)
        self.raw.block_size = block_size
        self.raw.size = num_blocks * block_size

    def __dealloc__(self):
        free(self.budget)

    cdef int stand_on(self, list bases, int own_frames=0, bint by_children=False) except -1:
        """Take the bases, and from them what an I/O needs and promises. Once, in __init__.

        ``own_frames``: those that the module itself pushes below the entry's. ``by_children``:
        the bases see nothing but children, whose frames are counted anew.
        """
        cdef Bdev base
        cdef uint32_t deepest = 1       # a flush behind a write
        for base in bases:
            if base is not None and not by_children:
                deepest = max(deepest, frames_below(base))
        return self.stand(bases, deepest + 1 + own_frames)

    cdef int stand_through(self, Bdev base) except -1:
        """The same where every I/O goes through to the base, whose entry's frame it shares."""
        return self.stand([base], frames_below(base))

    cdef int stand(self, list bases, uint32_t frames) except -1:
        cdef Bdev base
        self.bases = bases
        self.raw.frames = frames
        self.raw.flags = BDEV_FUA       # it is handed down
        for base in bases:
            if base is not None:
                self.raw.flags |= base.raw.flags & BDEV_VOLATILE_CACHE
                self.raw.depth = max(self.raw.depth, base.raw.depth + 1)
        if frames > IO_FRAMES - FRONT_END_FRAMES or self.raw.depth > MOST_DEPTH:
            raise UsageError(
                f"bdev '{self.name}' would stand on too many others, one on top of the other",
                hint="leave out one of the bdevs between it and the disk")
        return 0

    @property
    def block_size(self):
        return self.raw.block_size

    @property
    def num_blocks(self):
        return load_relaxed_u64(&self.raw.size) // self.raw.block_size

    @property
    def write_cache(self):
        return bool(self.raw.flags & BDEV_VOLATILE_CACHE)

    @property
    def buffer_alignment(self):
        return self.raw.buffer_mask + 1

    @property
    def io_types(self):
        return frozenset(
            name for i, name in enumerate(OPERATIONS) if self.raw.operations & (1 << i))

    @property
    def content_id(self):
        return f"uuid {self.uuid}"

    @property
    def volatile_content(self):
        return any(base is not None and base.volatile_content for base in self.bases)

    def driver_specific(self):
        return {}

    def save(self):
        return None

    def resize(self, num_blocks):
        if num_blocks <= 0 or num_blocks * self.block_size >= 1 << 63:
            raise UsageError(f"{num_blocks} blocks is no size for bdev '{self.name}'",
                             field="num_blocks")
        store_relaxed_u64(&self.raw.size, num_blocks * self.raw.block_size)

    def size_on_bases(self):
        return self.num_blocks

    def close(self):
        pass

    def keep_stats(self, stats):
        """A channel that closes leaves its figures here."""
        for name in OPERATIONS:
            self.closed_stats[name] = self.closed_stats[name].plus(stats[name])

    cdef int share_of(self, int core) except -1:
        """Which share of the limits a reactor has; with very many, two have the same."""
        if self.budget == NULL:
            self.budget = <budget_t*>calloc(1, sizeof(budget_t))
            if self.budget == NULL:
                raise MemoryError(f"no memory for the limits of bdev '{self.name}'")
            for share in range(QOS_SHARES):
                self.budget.shares[share].first[0] = NEVER
                self.budget.shares[share].first[1] = NEVER
            self.limited_cores = []
        if core not in self.limited_cores:
            self.limited_cores.append(core)
            store_release_u32(&self.budget.share_count,
                              <uint32_t>min(len(self.limited_cores), QOS_SHARES))
        return self.limited_cores.index(core) % QOS_SHARES

    def limit(self, rates):
        self.rates = tuple(rates) if any(rates) else None
        return [channel.limit(rates) for channel in self.channels]

    def count_times(self, layout):
        self.layout = layout
        self.closed_histogram = None if layout is None else Histogram(layout)
        return [channel.count_times(layout) for channel in self.channels]

    def times(self):
        cdef Channel channel
        if self.layout is None:
            raise HostError(f"the times of bdev '{self.name}' are not counted", EFAULT,
                            hint="begin with bdev_enable_histogram")
        total = Histogram(self.layout)
        total.add(self.closed_histogram)
        for channel in self.channels:
            total.add(channel.histogram)
        return total

    @property
    def queue_depth(self):
        cdef Channel channel
        depth = 0
        for channel in self.channels:
            depth += load_relaxed_u32(&channel.raw.inflight)
            if channel.raw.throttle != NULL:
                depth += load_relaxed_u32(&channel.raw.throttle.held[0])
                depth += load_relaxed_u32(&channel.raw.throttle.held[1])
        return depth

    def iostat(self):
        totals = dict(self.closed_stats)
        for channel in self.channels:
            for name, stats in channel.stats().items():
                totals[name] = totals[name].plus(stats)
        return totals

    def reset_iostat(self, mode="all"):
        self.closed_stats = {
            name: stats.cleared(mode) for name, stats in self.closed_stats.items()}
        for channel in self.channels:
            channel.clear_stats(mode)
