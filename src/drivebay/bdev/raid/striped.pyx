"""raid0 and concat. What lies on one base goes there as it is; the rest in children.

Context: reactor, except the classes.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drivebay.bdev.base cimport (
    IO_FLUSH, IO_READ, IO_WRITE, Bdev, Channel, channel_t, io_t)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.fanout cimport (
    Fanout, child_slice, child_t, fan_ops_t, fan_out, fan_t)

cdef inline bint has_buffers(const io_t* io) noexcept nogil:
    return io.operation == IO_READ or io.operation == IO_WRITE


cdef channel_t* next_flush(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """Every base that has something to flush, in turn. Bound: bases."""
    cdef striped_t* s = <striped_t*>channel.module
    cdef channel_t* base
    child.io.offset = 0
    child.io.length = 0
    while fan.position < s.geometry.count:
        base = s.bases[fan.position]
        fan.position += 1
        if base.bdev.operations & (1 << IO_FLUSH):
            return base
    return NULL


cdef fan_ops_t FLUSH = fan_ops_t(next_flush, NULL, NULL)


# --- raid0 ---------------------------------------------------------------------------------

cdef inline uint64_t strip_start(const geometry_t* g, uint64_t strip) noexcept nogil:
    """Where a strip of the disk lies in the data of its base."""
    return (strip // g.count) << g.strip_shift


cdef channel_t* next_strip(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """One child a strip: the buffers of a base's strips do not lie together."""
    cdef striped_t* s = <striped_t*>channel.module
    cdef const geometry_t* g = s.geometry
    cdef uint64_t at = fan.parent.offset + fan.position
    cdef uint64_t into = at & (g.strip - 1), strip = at >> g.strip_shift
    cdef uint64_t length = min(g.strip - into, fan.parent.length - fan.position)
    cdef uint32_t base = <uint32_t>(strip % g.count)
    if length == 0 or not child_slice(child, fan.position, length):
        return NULL
    child.io.offset = g.parts[base].data_offset + strip_start(g, strip) + into
    child.io.length = length
    fan.position += length
    return s.bases[base]


cdef channel_t* next_run(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """One child a base, however many strips: without buffers they are one run. Bound: bases."""
    cdef striped_t* s = <striped_t*>channel.module
    cdef const geometry_t* g = s.geometry
    cdef uint64_t begin = fan.parent.offset, last = begin + fan.parent.length - 1
    cdef uint64_t first_strip = begin >> g.strip_shift, last_strip = last >> g.strip_shift
    cdef uint64_t base, first, final, start, end
    while fan.position < g.count:
        base = fan.position
        fan.position += 1
        first = first_strip + (base + g.count - first_strip % g.count) % g.count
        if first > last_strip:
            continue
        final = last_strip - (last_strip % g.count + g.count - base) % g.count
        start = strip_start(g, first)
        if first == first_strip:
            start += begin & (g.strip - 1)
        end = strip_start(g, final) + (
            (last & (g.strip - 1)) + 1 if final == last_strip else g.strip)
        child.io.offset = g.parts[base].data_offset + start
        child.io.length = end - start
        return s.bases[base]
    return NULL


cdef fan_ops_t STRIPS = fan_ops_t(next_strip, NULL, NULL)
cdef fan_ops_t RUNS = fan_ops_t(next_run, NULL, NULL)


cdef int raid0_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef striped_t* s = <striped_t*>channel.module
    cdef const geometry_t* g = s.geometry
    cdef uint64_t into = io.offset & (g.strip - 1), strip = io.offset >> g.strip_shift
    cdef uint32_t base
    if io.operation == IO_FLUSH:
        return fan_out(s.fanout, io, &FLUSH)
    if g.count == 1:
        io.offset += g.parts[0].data_offset
        return bdev_submit(s.bases[0], io)
    if into + io.length <= g.strip:
        base = <uint32_t>(strip % g.count)
        io.offset = g.parts[base].data_offset + strip_start(g, strip) + into
        return bdev_submit(s.bases[base], io)
    return fan_out(s.fanout, io, &STRIPS if has_buffers(io) else &RUNS)


# --- concat --------------------------------------------------------------------------------

cdef inline uint32_t part_of(const geometry_t* g, uint64_t offset) noexcept nogil:
    """The base that has a byte; the last one for what lies behind. Bound: bases."""
    cdef uint32_t base = 0
    while base + 1 < g.count and offset >= g.parts[base].end:
        base += 1
    return base


cdef inline uint64_t place_in(const geometry_t* g, uint32_t base, uint64_t offset) noexcept nogil:
    return g.parts[base].data_offset + offset - (g.parts[base - 1].end if base else 0)


cdef channel_t* next_part(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    cdef striped_t* s = <striped_t*>channel.module
    cdef const geometry_t* g = s.geometry
    cdef uint64_t at = fan.parent.offset + fan.position
    cdef uint32_t base = part_of(g, at)
    cdef uint64_t length = min(g.parts[base].end - at, fan.parent.length - fan.position)
    if fan.position == fan.parent.length or not child_slice(child, fan.position, length):
        return NULL
    child.io.offset = place_in(g, base, at)
    child.io.length = length
    fan.position += length
    return s.bases[base]


cdef fan_ops_t PARTS = fan_ops_t(next_part, NULL, NULL)


cdef int concat_submit(channel_t* channel, io_t* io) noexcept nogil:
    cdef striped_t* s = <striped_t*>channel.module
    cdef const geometry_t* g = s.geometry
    cdef uint32_t base
    if io.operation == IO_FLUSH:
        return fan_out(s.fanout, io, &FLUSH)
    base = part_of(g, io.offset)
    if io.offset + io.length <= g.parts[base].end:
        io.offset = place_in(g, base, io.offset)
        return bdev_submit(s.bases[base], io)
    return fan_out(s.fanout, io, &PARTS)


# --- control -------------------------------------------------------------------------------

cdef class StripedChannel(Channel):
    def __init__(self, StripedBdev bdev, reactor, *bases):
        cdef Channel base
        cdef int i
        Channel.__init__(self, bdev, reactor)
        self.fanout = Fanout()
        self.fanout.raw.channel = &self.raw
        self.striped.fanout = &self.fanout.raw
        self.striped.geometry = &bdev.geometry
        self.striped.bases = <channel_t**>calloc(len(bases), sizeof(channel_t*))
        if self.striped.bases == NULL:
            raise MemoryError
        for i, base in enumerate(bases):
            self.striped.bases[i] = &base.raw       # open for longer than this one
        self.raw.submit = concat_submit if bdev.level == "concat" else raid0_submit
        self.raw.module = &self.striped

    def __dealloc__(self):
        free(self.striped.bases)


cdef class StripedBdev(Bdev):
    product_name = "Raid Volume"
    module = "raid"

    def __init__(self, str name, uuid, bases, data_offsets, data_sizes, uint64_t strip_bytes,
                 str level, raid):
        cdef uint64_t end = 0
        cdef int i
        Bdev.__init__(self, name, uuid, bases[0].block_size, sum(data_sizes))
        self.raid = raid
        self.level = level
        self.stand_on(list(bases))
        self.readonly = False
        self.raw.operations = common_operations(self.bases)
        self.geometry.parts = <part_t*>calloc(len(bases), sizeof(part_t))
        if self.geometry.parts == NULL:
            raise MemoryError
        for i in range(len(bases)):
            self.geometry.parts[i].data_offset = data_offsets[i] * self.raw.block_size
            end += data_sizes[i] * self.raw.block_size
            self.geometry.parts[i].end = end
        self.geometry.count = len(bases)
        self.geometry.strip = strip_bytes
        self.geometry.strip_shift = int(strip_bytes).bit_length() - 1

    def __dealloc__(self):
        free(self.geometry.parts)

    @property
    def content_id(self):
        return content_id_of(self)

    def size_on_bases(self):
        return self.raid.size_on_bases()

    def open_channel(self, reactor, *bases):
        return StripedChannel(self, reactor, *bases)

    def driver_specific(self):
        return {"raid": self.raid.describe()}


cdef uint32_t common_operations(list bases):
    """What all of them can do; a flush is for those that have it."""
    cdef Bdev base
    cdef uint32_t all_have = <uint32_t>-1, some_have = 0
    for base in bases:
        if base is not None:
            all_have &= base.raw.operations
            some_have |= base.raw.operations
    return all_have | some_have & (1 << IO_FLUSH)


def content_id_of(bdev):
    """Of a disk on bases: memory is another one in each process, a uuid stays."""
    if bdev.volatile_content:
        return "+".join(base.content_id for base in bdev.bases if base is not None)
    return f"uuid {bdev.uuid}"
