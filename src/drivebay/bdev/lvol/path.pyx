"""A volume's reads and writes: see path.pxd.

An I/O within one cluster that is allocated goes through to the base; one across clusters that
lie side by side is handed to it. The others fan out, one child for each run of clusters that
can be treated alike; children go to a channel of the volume's own that no gate holds, since
whoever gates the volume waits for their parents. Context: reactor, except the classes.
"""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from drivebay.bdev.base cimport (
    BDEV_VOLATILE_CACHE, FRAME_DONE, FRAME_TAKEN, IO_FLUSH, IO_FUA, IO_OPERATIONS, IO_READ,
    IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, SUBMIT_PENDING, Bdev, Channel, channel_t,
    io_complete, io_push, io_t,
)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.fanout cimport Fanout, child_slice, child_t, fan_ops_t, fan_out, fan_t
from drivebay.bdev.lvol.contents cimport claim_t
from drivebay.bdev.lvol.space cimport Space, space_claim
from drivebay.bdev.lvol.table cimport (
    FOUND_CLUSTER, FOUND_EXTERNAL, ClusterTable, table_find, table_own, table_t)
from drivebay.bdev.lvol.turns cimport Turns, clear_buffers
from drivebay.memory.platform cimport load_acquire_u64, load_relaxed_u64, store_release_u64
from drivebay.reactor.io cimport io_list_append
from drivebay.reactor.turn_engine cimport engine_of

from drivebay.bdev.lvol.table import ClusterTable

# Where a piece of a volume is, for one operation.
cdef enum:
    PLACE_BASE = 0
    PLACE_EXTERNAL = 1
    PLACE_NOTHING = 2       # reads as zeroes; there is nothing to unmap or to clear
    PLACE_UNCLAIMED = 3     # needs a cluster of its own first

cdef enum:
    OWN_FRAMES = 1          # the flush behind a write, or what notes a flush


# --- places --------------------------------------------------------------------------------

cdef inline uint64_t cluster_index(const volume_t* volume, uint64_t offset) noexcept nogil:
    if volume.shift >= 0:
        return offset >> volume.shift
    return offset // volume.cluster_bytes


cdef int place_at(const volume_t* volume, uint8_t operation, uint64_t offset,
                  uint32_t* cluster, uint64_t* run) noexcept nogil:
    """Where it is, and for how many bytes within its cluster that is so."""
    cdef const table_t* table = volume.table[0]
    cdef uint64_t index = cluster_index(volume, offset), size
    cdef int found
    run[0] = (index + 1) * volume.cluster_bytes - offset
    cluster[0] = table_own(table, index)
    if cluster[0]:
        return PLACE_BASE
    if operation == IO_UNMAP:
        return PLACE_NOTHING
    if operation == IO_WRITE:
        return PLACE_UNCLAIMED
    found = table_find(table, index, cluster)
    if found == FOUND_EXTERNAL and volume.external != NULL:
        size = load_relaxed_u64(&volume.external.bdev.size)
        if offset >= size:
            return PLACE_NOTHING
        run[0] = min(run[0], size - offset)
    if found == FOUND_CLUSTER or found == FOUND_EXTERNAL:
        if operation == IO_WRITE_ZEROES:
            run[0] = (index + 1) * volume.cluster_bytes - offset
            return PLACE_UNCLAIMED
        return PLACE_BASE if found == FOUND_CLUSTER else PLACE_EXTERNAL
    return PLACE_NOTHING


cdef int place_run(const volume_t* volume, uint8_t operation, uint64_t offset, uint64_t length,
                   uint32_t* cluster, uint64_t* run) noexcept nogil:
    """The same for as far as it can be one I/O. Bound: the clusters of ``length``."""
    cdef int place = place_at(volume, operation, offset, cluster, run)
    cdef uint64_t more = 0
    cdef uint32_t previous = cluster[0], following = 0
    if place == PLACE_UNCLAIMED:
        return place
    while run[0] < length:
        if place_at(volume, operation, offset + run[0], &following, &more) != place:
            break
        if place == PLACE_BASE and following != previous + 1:
            break
        previous = following
        run[0] += more
    return place


# --- one I/O in one place ------------------------------------------------------------------

cdef inline bint is_unstable(const volume_t* volume) noexcept nogil:
    """Whether the disk may still forget which clusters are whose."""
    return volume.cached and (load_acquire_u64(&volume.space.pages_written)
                              != load_acquire_u64(&volume.space.pages_stable))


cdef bint lvol_place(channel_t* channel, io_t* io) noexcept nogil:
    """Whether it lies in one cluster that is allocated, as nearly every I/O does; and where."""
    cdef volume_t* volume = <volume_t*>channel.module
    cdef uint64_t index, within
    cdef uint32_t cluster
    if io.operation == IO_FLUSH:
        return False
    index = cluster_index(volume, io.offset)
    within = io.offset - index * volume.cluster_bytes
    cluster = table_own(volume.table[0], index)
    if cluster == 0 or within + io.length > volume.cluster_bytes:
        return False
    if io.flags & IO_FUA and is_unstable(volume):
        return False
    io.offset = cluster * volume.cluster_bytes + within
    return True


cdef int lvol_submit(channel_t* channel, io_t* io) noexcept nogil:
    return submit_anything(<volume_t*>channel.module, io)


cdef int submit_anything(volume_t* volume, io_t* io) noexcept nogil:
    cdef uint64_t run = 0
    cdef uint32_t cluster = 0
    cdef int place
    io.status = 0
    if io.operation == IO_FLUSH:
        return submit_flush(volume, io)
    if io.length == 0:
        return SUBMIT_DONE
    place = place_run(volume, io.operation, io.offset, io.length, &cluster, &run)
    if run < io.length:
        return fan_out(volume.fanout, io, &PARTS)
    if place == PLACE_BASE:
        io.offset -= cluster_index(volume, io.offset) * volume.cluster_bytes
        io.offset += cluster * volume.cluster_bytes
        return submit_to_base(volume, io)
    if place == PLACE_UNCLAIMED:
        return wait_for_cluster(volume, io)
    if place == PLACE_EXTERNAL:
        if volume.external != NULL:
            return bdev_submit(volume.external, io)
        io.status = -EIO
        return SUBMIT_DONE
    if io.operation == IO_READ:
        return clear_buffers(volume.turns, io)
    return SUBMIT_DONE


cdef int submit_to_base(volume_t* volume, io_t* io) noexcept nogil:
    """A write that shall be stable is that only when the way to its cluster is, too."""
    if not io.flags & IO_FUA or io.operation == IO_READ or not is_unstable(volume):
        return bdev_submit(volume.base, io)
    io.flags &= <uint8_t>~IO_FUA
    io_push(io, written_unstable, volume, 0)
    if bdev_submit(volume.base, io) != SUBMIT_DONE:
        return SUBMIT_PENDING
    io.frame_count -= 1
    return flush_behind(volume, io)


cdef int written_unstable(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    if flush_behind(<volume_t*>context, io) != SUBMIT_DONE:
        return FRAME_TAKEN
    return FRAME_DONE


cdef int flush_behind(volume_t* volume, io_t* io) noexcept nogil:
    """The write is done; for those above, the flush is a part of it."""
    cdef uint64_t operation = io.operation
    cdef int how
    io.flags |= IO_FUA
    if io.status < 0:
        return SUBMIT_DONE
    io.operation = IO_FLUSH
    io_push(io, flushed_behind, volume, operation,
            load_acquire_u64(&volume.space.pages_written))
    how = bdev_submit(volume.base, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        flushed_behind(io, volume, operation, io.frames[io.frame_count].stamp)
    return how


cdef int flushed_behind(
    io_t* io, void* context, uint64_t operation, uint64_t pages
) noexcept nogil:
    io.operation = <uint8_t>operation
    note_stable(<volume_t*>context, io, pages)
    return FRAME_DONE


cdef void note_stable(volume_t* volume, const io_t* io, uint64_t pages) noexcept nogil:
    """The flush covers those pages. Of two at once the later word counts: it costs a flush."""
    if io.status == 0:
        store_release_u64(&volume.space.pages_stable, pages)


cdef int submit_flush(volume_t* volume, io_t* io) noexcept nogil:
    cdef uint64_t pages
    cdef int how
    if not volume.cached:
        return bdev_submit(volume.base, io)
    pages = load_acquire_u64(&volume.space.pages_written)
    io_push(io, flushed_behind, volume, IO_FLUSH, pages)
    how = bdev_submit(volume.base, io)
    if how == SUBMIT_DONE:
        io.frame_count -= 1
        note_stable(volume, io, pages)
    return how


# --- first writes --------------------------------------------------------------------------

cdef inline wait_t** bucket_of(volume_t* volume, uint64_t index) noexcept nogil:
    return &volume.waits[index & (CLAIMS - 1)]


cdef int wait_for_cluster(volume_t* volume, io_t* io) noexcept nogil:
    """Ask the owner for a cluster, once for all that write to it."""
    cdef uint64_t index = cluster_index(volume, io.offset)
    cdef wait_t** bucket = bucket_of(volume, index)
    cdef wait_t* wait = bucket[0]
    while wait != NULL and wait.claim.index != index:
        wait = wait.next
    if wait != NULL:
        io_list_append(&wait.waiting, io)
        return SUBMIT_PENDING
    wait = volume.free
    if wait == NULL:
        io_list_append(&volume.starved, io)
        return SUBMIT_PENDING
    volume.free = wait.next
    wait.next = bucket[0]
    bucket[0] = wait
    wait.waiting.first = NULL
    io_list_append(&wait.waiting, io)
    wait.claim.table = volume.table[0]
    wait.claim.index = index
    wait.claim.home = volume.part.reactor
    wait.claim.granted = granted
    space_claim(volume.space, &wait.claim)
    return SUBMIT_PENDING


cdef void granted(claim_t* claim) noexcept nogil:
    """The owner has answered: those that waited go on, and those that could not even ask."""
    cdef wait_t* wait = <wait_t*>claim
    cdef volume_t* volume = wait.volume
    cdef wait_t** link = bucket_of(volume, claim.index)
    cdef io_t* io = wait.waiting.first
    cdef int32_t status = claim.status
    while link[0] != wait:
        link = &link[0].next
    link[0] = wait.next
    wait.next = volume.free
    volume.free = wait
    go_on(volume, io, status)
    io = volume.starved.first
    volume.starved.first = NULL
    go_on(volume, io, 0)


cdef void go_on(volume_t* volume, io_t* io, int32_t status) noexcept nogil:
    """Bound: those that waited."""
    cdef io_t* following
    while io != NULL:
        following = io.link
        io.status = status
        if status < 0 or submit_anything(volume, io) == SUBMIT_DONE:
            io_complete(io)
        io = following


# --- across clusters -----------------------------------------------------------------------

cdef channel_t* next_part(channel_t* channel, fan_t* fan, child_t* child) noexcept nogil:
    """A child for each run; what needs nothing done gets none. Bound: the I/O's clusters."""
    cdef volume_t* volume = <volume_t*>channel.module
    cdef const io_t* parent = fan.parent
    cdef uint64_t run = 0, left
    cdef uint32_t cluster = 0
    cdef int place
    while fan.position < parent.length:
        left = parent.length - fan.position
        place = place_run(volume, parent.operation, parent.offset + fan.position, left, &cluster,
                          &run)
        run = min(run, left)
        if place == PLACE_NOTHING and parent.operation != IO_READ:
            fan.position += run
            continue
        if not child_slice(child, fan.position, run):
            return NULL
        child.io.offset = parent.offset + fan.position
        child.io.length = run
        fan.position += run
        return &volume.part
    return NULL


cdef fan_ops_t PARTS
PARTS.next_child = next_part


# --- control -------------------------------------------------------------------------------

cdef class LvolChannel(Channel):
    def __init__(self, LvolBdev bdev, reactor, Channel base, Channel external):
        cdef int i
        cdef volume_t* volume = &self.volume
        Channel.__init__(self, bdev, reactor)
        self.base = base
        self.external = external
        self.fanout = Fanout()
        self.turns = engine_of(self.reactor, Turns)
        self.fanout.raw.channel = &self.raw
        volume.base = &base.raw
        volume.external = NULL if external is None else &external.raw
        volume.table = &bdev.raw_table
        volume.space = &bdev.space.raw
        volume.turns = &self.turns.raw
        volume.fanout = &self.fanout.raw
        volume.cluster_bytes = bdev.space.raw.cluster_bytes
        volume.shift = -1
        if volume.cluster_bytes & (volume.cluster_bytes - 1) == 0:
            volume.shift = int(bdev.space.cluster_bytes).bit_length() - 1
        volume.cached = (base.bdev.raw.flags & BDEV_VOLATILE_CACHE) != 0
        for i in range(CLAIMS):
            volume.memory[i].volume = volume
            volume.memory[i].next = volume.free
            volume.free = &volume.memory[i]
        volume.part.submit = lvol_submit
        volume.part.bdev = &volume.part_bdev
        volume.part.reactor = &self.reactor.raw
        volume.part.module = volume
        volume.part_bdev.size = <uint64_t>-1
        volume.part_bdev.block_size = 1
        volume.part_bdev.operations = (1 << IO_OPERATIONS) - 1
        self.raw.through = &base.raw
        self.raw.place = lvol_place
        self.raw.submit = lvol_submit
        self.raw.module = volume


cdef class LvolBdev(Bdev):
    product_name = "Logical Volume"
    module = "lvol"

    def __init__(self, str name, uuid, Space space, ClusterTable table, Bdev external=None, *,
                 bint readonly=False, describe=None):
        cdef Bdev base = space.base.bdev
        Bdev.__init__(self, name, uuid, base.block_size,
                      table.num_clusters * space.cluster_bytes // base.block_size)
        self.stand_on([base] if external is None else [base, external], OWN_FRAMES)
        self.space = space
        self.describe = describe
        self.writing = base.raw.operations & (
            1 << IO_WRITE | 1 << IO_UNMAP | 1 << IO_WRITE_ZEROES)
        self.raw.operations = base.raw.operations
        self.set_table(table)
        self.set_readonly(readonly)

    @property
    def table(self):
        return self.current

    def set_table(self, ClusterTable table):
        self.current = table
        self.raw_table = &table.raw

    def set_readonly(self, bint readonly):
        self.readonly = readonly
        if readonly:
            self.raw.operations &= ~self.writing
        else:
            self.raw.operations |= self.writing

    @property
    def volatile_content(self):
        return self.bases[0].volatile_content

    def open_channel(self, reactor, *bases):
        return LvolChannel(self, reactor, bases[0], bases[1] if len(bases) > 1 else None)

    def driver_specific(self):
        return {} if self.describe is None else {"lvol": self.describe()}
