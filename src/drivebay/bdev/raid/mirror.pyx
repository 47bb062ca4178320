"""raid1 on the path, and the doors through which control changes it.

Context: reactor, except the classes.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drivebay.bdev.base cimport (
    BDEV_VOLATILE_CACHE, FRAME_DONE, FRAME_TAKEN, IO_FLUSH, IO_READ, SUBMIT_DONE, SUBMIT_PENDING,
    Bdev, Channel, channel_t, io_complete, io_push, io_t)
from drivebay.bdev.fanout cimport Fanout, child_slice, child_t, fan_ops_t, fan_out, fan_t
from drivebay.bdev.raid.striped cimport common_operations
from drivebay.memory.platform cimport load_acquire_u32, store_release_u32
from drivebay.reactor.io cimport frame_t, io_list_append
from drivebay.reactor.mailbox cimport EventOwner, event_raise, message_answer, message_t

from drivebay.bdev.raid.striped import content_id_of

cdef uint32_t NOBODY = <uint32_t>-1

# frame_t.saved of a write
cdef enum:
    EPOCH = 1
    SUSPECT = 2

# frame_t.saved of a read: the leg that was asked first, and the last one, above it
cdef enum:
    LEG_BITS = 8
    LEG_MASK = 255
    ASKED = 1 << 16


cdef inline mirror_t* mirror_of(const channel_t* channel) noexcept nogil:
    return <mirror_t*>channel.module


cdef inline void leave(leg_t* leg) noexcept nogil:
    """A child of the leg is back."""
    cdef message_t* message
    leg.inflight -= 1
    if leg.inflight == 0 and leg.leaving != NULL:
        message = leg.leaving
        leg.leaving = NULL
        message_answer(message, 0)


# --- reading -------------------------------------------------------------------------------

cdef inline bint readable(const mirror_t* m, uint32_t i) noexcept nogil:
    return m.legs[i].base != NULL and i != m.target


cdef uint32_t pick(const mirror_t* m, uint64_t asked) noexcept nogil:
    """The leg with the least to read; or the next one, after those that failed. Bound: legs."""
    cdef uint32_t i, best = NOBODY, first
    if not asked & ASKED:
        for i in range(m.count):
            if readable(m, i) and (best == NOBODY or m.legs[i].reading < m.legs[best].reading):
                best = i
        return best
    first = asked & LEG_MASK
    i = ((asked >> LEG_BITS & LEG_MASK) + 1) % m.count
    while i != first:
        if readable(m, i):
            return i
        i = (i + 1) % m.count
    return NOBODY


cdef channel_t* next_read(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """The only child; which leg it went to is noted in the parent's frame."""
    cdef mirror_t* m = mirror_of(channel)
    cdef io_t* parent = fan.parent
    cdef frame_t* frame = &parent.frames[parent.frame_count - 1]
    cdef uint32_t i
    if fan.position:
        return NULL
    i = pick(m, frame.saved)
    if i == NOBODY:
        fan.status = -EIO
        return NULL
    if not child_slice(child, 0, parent.length):
        return NULL
    if not frame.saved & ASKED:
        frame.saved = ASKED | i
    frame.saved = frame.saved & ~<uint64_t>(LEG_MASK << LEG_BITS) | i << LEG_BITS
    child.word = i
    child.io.offset = parent.offset + m.legs[i].data_offset
    child.io.length = parent.length
    fan.position = 1
    m.legs[i].inflight += 1
    m.legs[i].reading += parent.length
    return m.legs[i].base


cdef void read_joined(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    cdef leg_t* leg = &mirror_of(channel).legs[child.word]
    leg.reading -= fan.parent.length
    leave(leg)
    if child.io.status < 0:
        fan.status = child.io.status


cdef void want_repair(channel_t* channel, const io_t* io, uint32_t i) noexcept nogil:
    """What another leg had can be written where it could not be read; one at a time."""
    cdef mirror_t* m = mirror_of(channel)
    if load_acquire_u32(&m.repair.wanted) or m.legs[i].base == NULL:
        return
    m.repair.offset = io.offset
    m.repair.length = io.length
    m.repair.leg = i
    store_release_u32(&m.repair.wanted, 1)
    event_raise(channel.reactor.control, &m.event, TROUBLE_READ)


cdef int read_on(channel_t* channel, io_t* io, uint64_t asked) noexcept nogil:
    """Ask one leg after the other until one has it. Returns as a frame. Bound: legs."""
    cdef mirror_t* m = mirror_of(channel)
    while io.status < 0 and pick(m, asked) != NOBODY:
        io_push(io, read_done, channel, asked)
        if fan_out(m.fanout, io, &READ) != SUBMIT_DONE:
            return FRAME_TAKEN
        io.frame_count -= 1
        asked = io.frames[io.frame_count].saved
    if io.status >= 0 and (asked >> LEG_BITS & LEG_MASK) != (asked & LEG_MASK):
        want_repair(channel, io, asked & LEG_MASK)
    return FRAME_DONE


cdef int read_done(io_t* io, void* context, uint64_t asked, uint64_t stamp) noexcept nogil:
    return read_on(<channel_t*>context, io, asked)


cdef int submit_read(channel_t* channel, io_t* io) noexcept nogil:
    io.status = -EIO        # of no leg at all
    return SUBMIT_DONE if read_on(channel, io, 0) == FRAME_DONE else SUBMIT_PENDING


# --- writing, and all else that changes something ------------------------------------------

cdef inline bint is_meant(const mirror_t* m, uint32_t i, const io_t* io) noexcept nogil:
    """Whether a leg has a part in what changes something."""
    if m.legs[i].base == NULL:
        return False
    if io.operation == IO_FLUSH:
        return m.legs[i].base.bdev.operations & (1 << IO_FLUSH) != 0
    return i != m.target or io.offset < m.frontier


cdef channel_t* next_write(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """Every leg that has a base; the target only for what is copied already. Bound: legs."""
    cdef mirror_t* m = mirror_of(channel)
    cdef const io_t* parent = fan.parent
    cdef uint32_t i
    while fan.position < m.count:
        i = <uint32_t>fan.position
        if not is_meant(m, i, parent):
            fan.position += 1
            continue
        if not child_slice(child, 0, parent.length):
            return NULL
        child.word = i
        if parent.operation != IO_FLUSH:
            child.io.offset = parent.offset + m.legs[i].data_offset
            child.io.length = parent.length
        else:
            child.io.offset = 0
            child.io.length = 0
        fan.position += 1
        m.legs[i].inflight += 1
        return m.legs[i].base
    return NULL


cdef void write_joined(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """fan.word counts the legs that have it, of those that can be read."""
    cdef mirror_t* m = mirror_of(channel)
    cdef leg_t* leg = &m.legs[child.word]
    leave(leg)
    if child.io.status >= 0:
        if readable(m, child.word):
            fan.word += 1
        return
    if fan.status == 0:
        fan.status = child.io.status
    if leg.base != NULL and m.present > 1:      # the last one is kept, its errors are the guest's
        leg.failed = True
        fan.parent.frames[fan.parent.frame_count - 1].saved |= SUSPECT


cdef void write_ended(channel_t* channel, fan_t* fan) noexcept nogil:
    cdef mirror_t* m = mirror_of(channel)
    cdef message_t* message = m.window
    m.writes[fan.parent.frames[fan.parent.frame_count - 1].saved & EPOCH] -= 1
    if message != NULL and m.writes[m.epoch ^ 1] == 0:
        m.window = NULL
        message_answer(message, 0)
    if fan.word:
        fan.status = 0
    elif fan.status == 0 and (m.present == 0 or fan.parent.operation != IO_FLUSH):
        fan.status = -EIO


cdef void suspend(channel_t* channel, io_t* io) noexcept nogil:
    io_list_append(&mirror_of(channel).suspended, io)
    event_raise(channel.reactor.control, &mirror_of(channel).event, TROUBLE_WRITE)


cdef int write_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    if not saved & SUSPECT:
        return FRAME_DONE
    suspend(<channel_t*>context, io)
    return FRAME_TAKEN


cdef fan_ops_t READ = fan_ops_t(next_read, read_joined, NULL)
cdef fan_ops_t WRITE = fan_ops_t(next_write, write_joined, write_ended)


cdef int submit_write(channel_t* channel, io_t* io) noexcept nogil:
    cdef mirror_t* m = mirror_of(channel)
    cdef int how
    m.writes[m.epoch] += 1
    io_push(io, write_done, channel, m.epoch)
    how = fan_out(m.fanout, io, &WRITE)
    if how != SUBMIT_DONE:
        return how
    io.frame_count -= 1
    if not io.frames[io.frame_count].saved & SUSPECT:
        return SUBMIT_DONE
    suspend(channel, io)
    return SUBMIT_PENDING


cdef int mirror_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef mirror_t* m = mirror_of(channel)
    if io.operation == IO_READ:
        return submit_read(channel, io)
    if (io.offset < m.window_end and io.offset + io.length > m.window_start
            and io.operation != IO_FLUSH):
        io_list_append(&m.held, io)
        return SUBMIT_PENDING
    return submit_write(channel, io)


# --- what control asks ---------------------------------------------------------------------

cdef inline channel_t* channel_of(message_t* message) noexcept nogil:
    return <channel_t*>message.target


cdef void act_set_base(message_t* message, void* reactor) noexcept nogil:
    """Arguments: the leg, its new base, and where the data begin on that."""
    cdef mirror_t* m = mirror_of(channel_of(message))
    cdef leg_t* leg = &m.legs[message.argument[0]]
    m.present -= leg.base != NULL
    leg.base = <channel_t*>message.argument[1]
    leg.data_offset = message.argument[2]
    m.present += leg.base != NULL
    leg.failed = False
    if leg.inflight:
        leg.leaving = message
    else:
        message_answer(message, 0)


cdef void act_set_target(message_t* message, void* reactor) noexcept nogil:
    cdef mirror_t* m = mirror_of(channel_of(message))
    m.target = <uint32_t>message.argument[0]
    m.frontier = message.argument[1]
    message_answer(message, 0)


cdef void release_held(channel_t* channel) noexcept nogil:
    cdef io_t* io = mirror_of(channel).held.first
    cdef io_t* following
    mirror_of(channel).held.first = NULL
    while io != NULL:
        following = io.link
        if mirror_submit(channel, io) == SUBMIT_DONE:
            io_complete(io)
        io = following


cdef void act_set_window(message_t* message, void* reactor) noexcept nogil:
    """Arguments: start, end, frontier. Answered when every write that began before is back.

    That holds for a window of nothing too: those held go on first.
    """
    cdef channel_t* channel = channel_of(message)
    cdef mirror_t* m = mirror_of(channel)
    m.window_start = message.argument[0]
    m.window_end = message.argument[1]
    m.frontier = message.argument[2]
    if m.window_end == 0:
        release_held(channel)
        message_answer(message, 0)
        return
    m.epoch ^= 1
    if m.writes[m.epoch ^ 1]:
        m.window = message
    else:
        message_answer(message, 0)


cdef void act_collect(message_t* message, void* reactor) noexcept nogil:
    """Which legs failed writes; those writes may end at the next act_settle. Bound: legs."""
    cdef mirror_t* m = mirror_of(channel_of(message))
    cdef uint32_t i
    for i in range(m.count):
        m.legs[i].reported = m.legs[i].failed
        m.legs[i].failed = False
    if m.suspended.first != NULL:
        if m.judged.first == NULL:
            m.judged = m.suspended
        else:
            m.judged.last.link = m.suspended.first
            m.judged.last = m.suspended.last
        m.suspended.first = NULL
    message_answer(message, 0)


cdef void act_settle(message_t* message, void* reactor) noexcept nogil:
    """Argument: may they have succeeded?"""
    cdef mirror_t* m = mirror_of(channel_of(message))
    cdef io_t* io = m.judged.first
    cdef io_t* following
    m.judged.first = NULL
    while io != NULL:
        following = io.link
        if io.status >= 0 and not message.argument[0]:
            io.status = -EIO
        io_complete(io)
        io = following
    message_answer(message, 0)


# --- control -------------------------------------------------------------------------------

cdef class Trouble(EventOwner):
    """What a channel raises comes to the RAID from here."""

    cdef int on_event(self, uint32_t bits) except -1:
        (<MirrorBdev>self.channel.bdev).raid.trouble()
        return 0


cdef class MirrorChannel(Channel):
    def __init__(self, MirrorBdev bdev, reactor, *bases):
        cdef Channel base
        cdef uint32_t i
        Channel.__init__(self, bdev, reactor)
        self.fanout = Fanout()
        self.fanout.raw.channel = &self.raw
        self.mirror.fanout = &self.fanout.raw
        self.mirror.count = bdev.count
        self.mirror.legs = <leg_t*>calloc(bdev.count, sizeof(leg_t))
        if self.mirror.legs == NULL:
            raise MemoryError
        for i, base in enumerate(bases):
            if base is not None:
                self.mirror.legs[i].base = &base.raw
                self.mirror.legs[i].data_offset = bdev.data_offsets[i]
                self.mirror.present += 1
        self.trouble = Trouble()
        self.trouble.channel = self
        self.mirror.event.owner = <void*>self.trouble
        self.raw.submit = mirror_submit
        self.raw.module = &self.mirror

    def __dealloc__(self):
        free(self.mirror.legs)

    def activate(self):
        """In control, as all changes of what it copies here: none can come in between."""
        cdef MirrorBdev bdev = self.bdev
        self.mirror.target = bdev.target
        self.mirror.frontier = bdev.frontier
        self.mirror.window_start = bdev.window_start
        self.mirror.window_end = bdev.window_end
        return Channel.activate(self)

    def set_base(self, index, Channel channel):
        cdef uint64_t base = 0, data_offset = 0
        if channel is not None:
            base = <uint64_t>&channel.raw
            data_offset = (<MirrorBdev>self.bdev).data_offsets[index]
        return self.reactor.ask(act_set_base, &self.raw, (self, channel), index, base, data_offset)

    def set_target(self):
        cdef MirrorBdev bdev = self.bdev
        return self.reactor.ask(act_set_target, &self.raw, self, bdev.target, bdev.frontier)

    def set_window(self):
        cdef MirrorBdev bdev = self.bdev
        return self.reactor.ask(act_set_window, &self.raw, self, bdev.window_start,
                                bdev.window_end, bdev.frontier)

    def collect(self):
        return self.reactor.ask(act_collect, &self.raw, self)

    def settle(self, bint kept):
        return self.reactor.ask(act_settle, &self.raw, self, kept)

    def failed_legs(self):
        return [i for i in range(self.mirror.count) if self.mirror.legs[i].reported]

    def wanted_repair(self):
        cdef repair_t* repair = &self.mirror.repair
        if not load_acquire_u32(&repair.wanted):
            return None
        return repair.leg, repair.offset, repair.length

    def end_repair(self):
        store_release_u32(&self.mirror.repair.wanted, 0)


cdef class MirrorBdev(Bdev):
    product_name = "Raid Volume"
    module = "raid"

    def __init__(self, str name, uuid, int block_size, num_blocks, bases, data_offsets, raid):
        Bdev.__init__(self, name, uuid, block_size, num_blocks)
        self.raid = raid
        self.count = self.target = len(bases)
        self.data_offsets = [offset * block_size for offset in data_offsets]
        self.stand_on(list(bases), own_frames=1, by_children=True)
        self.raw.operations = common_operations(self.bases)
        # A base that comes later may have a cache: a guest is told of one from the start.
        if self.raw.operations & (1 << IO_FLUSH):
            self.raw.flags |= BDEV_VOLATILE_CACHE

    @property
    def content_id(self):
        return content_id_of(self)

    @property
    def volatile_content(self):
        return all(base.volatile_content for base in self.bases if base is not None)

    def size_on_bases(self):
        return self.raid.size_on_bases()

    def open_channel(self, reactor, *bases):
        return MirrorChannel(self, reactor, *bases)

    def driver_specific(self):
        return {"raid": self.raid.describe()}

    def live_channels(self):
        return list(self.channels)

    def place_data(self, index, data_offset):
        self.data_offsets[index] = data_offset * self.block_size

    def set_target(self, index, frontier=0):
        self.target = self.count if index is None else index
        self.frontier = frontier
        return [channel.set_target() for channel in self.channels]

    def set_window(self, start, end, frontier=None):
        self.window_start, self.window_end = start, end
        if frontier is not None:
            self.frontier = frontier
        return [channel.set_window() for channel in self.channels]
