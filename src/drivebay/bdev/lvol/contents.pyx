"""The first content of clusters: see contents.pxd. Context: reactor; nothing waits."""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

from drivebay.bdev.base cimport (
    BDEV_VOLATILE_CACHE, FRAME_TAKEN, IO_FLUSH, IO_MAY_UNMAP, IO_READ, IO_WRITE, IO_WRITE_ZEROES,
    SUBMIT_DONE, Channel, channel_t, io_push, io_t,
)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.lvol.table cimport FOUND_CLUSTER, FOUND_EXTERNAL, table_find, table_t
from drivebay.bdev.lvol.turns cimport Turns, turn_due, turn_t
from drivebay.memory.platform cimport load_relaxed_u64
from drivebay.reactor.turn_engine cimport engine_of

from drivebay.errors import HostError


cdef void contents_make(contents_t* contents, claim_t* claim, bint zeroed) noexcept nogil:
    """Have the claim's cluster filled; ``zeroed``: nothing but zeroes is in it now."""
    cdef uint32_t cluster = 0
    if zeroed and table_find(claim.table, claim.index, &cluster) == 0:
        contents.made(contents, claim)
        return
    claims_append(&contents.waiting, claim)
    turn_due(contents.turns, &contents.turn)


cdef void run(turn_t* turn) noexcept nogil:
    """Go on with what was answered at once, then begin with what waits. Bound: COPIERS."""
    cdef contents_t* contents = <contents_t*>(<char*>turn - <size_t>&(<contents_t*>NULL).turn)
    cdef copier_t* copier = contents.answered
    cdef copier_t* following
    contents.answered = NULL
    while copier != NULL:
        following = copier.next
        go_on(copier)
        copier = following
    if contents.flush_answered:
        contents.flush_answered = False
        end_flush(contents)
    while contents.free != NULL and contents.waiting.first != NULL:
        copier = contents.free
        contents.free = copier.next
        begin(copier, claims_take(&contents.waiting))


cdef channel_t* external_channel(const table_t* table) noexcept nogil:
    """That of the last one in the chain. Bound: its length."""
    while table.parent != NULL:
        table = table.parent
    return table.external_channel


cdef void begin(copier_t* copier, claim_t* claim) noexcept nogil:
    cdef contents_t* contents = copier.contents
    cdef uint32_t cluster = 0
    cdef int found = table_find(claim.table, claim.index, &cluster)
    copier.claim = claim
    copier.done = 0
    copier.source = NULL
    copier.source_end = 0
    copier.writing = False
    if found == FOUND_CLUSTER:
        copier.source = contents.base
        copier.source_offset = cluster * contents.cluster_bytes
        copier.source_end = copier.source_offset + contents.cluster_bytes
    elif found == FOUND_EXTERNAL:
        copier.source = external_channel(claim.table)
        if copier.source == NULL:
            finish(copier, -EIO)
            return
        copier.source_offset = claim.index * contents.cluster_bytes
        copier.source_end = load_relaxed_u64(&copier.source.bdev.size)
    submit(copier)


cdef bint read_piece(copier_t* copier, uint64_t length) noexcept nogil:
    """Prepare to read what the source has of a piece; the rest is zeroes. Returns: is there any?"""
    cdef uint64_t offset = copier.source_offset + copier.done, present = 0
    if copier.source != NULL and offset < copier.source_end:
        present = min(length, copier.source_end - offset)
    if present < length:
        memset(copier.buffer + present, 0, length - present)
    copier.io.operation = IO_READ
    copier.io.offset = offset
    copier.io.length = copier.part.iov_len = present
    return present != 0


cdef void prepare(copier_t* copier) noexcept nogil:
    """The next I/O: a read, or the write of what was read, or all zeroes at once."""
    cdef contents_t* contents = copier.contents
    cdef uint64_t length = min(contents.cluster_bytes - copier.done, <uint64_t>COPY_BYTES)
    copier.io.flags = 0
    copier.io.iov = &copier.part
    copier.io.iov_count = 1
    copier.part.iov_base = copier.buffer
    if copier.source == NULL and contents.base.bdev.operations & (1 << IO_WRITE_ZEROES):
        copier.writing = True
        copier.io.operation = IO_WRITE_ZEROES
        copier.io.flags = IO_MAY_UNMAP
        copier.io.iov_count = 0
        length = contents.cluster_bytes
    elif not copier.writing:
        if read_piece(copier, length):
            return
        copier.writing = True
    if copier.io.iov_count:
        copier.io.operation = IO_WRITE
    copier.io.offset = copier.claim.cluster * contents.cluster_bytes + copier.done
    copier.io.length = copier.part.iov_len = length


cdef void submit(copier_t* copier) noexcept nogil:
    """An answer at once is looked at in the next turn: others wait for this one to end."""
    cdef contents_t* contents = copier.contents
    prepare(copier)
    copier.io.frame_count = 0
    io_push(&copier.io, copier_done, copier, 0)
    if bdev_submit(contents.base if copier.writing else copier.source,
                   &copier.io) == SUBMIT_DONE:
        copier.next = contents.answered
        contents.answered = copier
        turn_due(contents.turns, &contents.turn)


cdef int copier_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    go_on(<copier_t*>context)
    return FRAME_TAKEN      # it may be on its way again


cdef void go_on(copier_t* copier) noexcept nogil:
    """Its I/O is back."""
    if copier.io.status < 0:
        finish(copier, copier.io.status)
        return
    if copier.writing:
        copier.done += copier.io.length
        if copier.done == copier.contents.cluster_bytes:
            finish(copier, 0)
            return
    copier.writing = not copier.writing
    submit(copier)


cdef void finish(copier_t* copier, int32_t status) noexcept nogil:
    cdef contents_t* contents = copier.contents
    copier.claim.status = status
    if status == 0 and contents.cached:
        claims_append(&contents.unflushed, copier.claim)
        begin_flush(contents)
    else:
        contents.made(contents, copier.claim)
    copier.next = contents.free
    contents.free = copier
    turn_due(contents.turns, &contents.turn)


# --- the flush behind them -----------------------------------------------------------------

cdef void begin_flush(contents_t* contents) noexcept nogil:
    """One at a time, for all that were written before it."""
    if contents.flushing.first != NULL or contents.unflushed.first == NULL:
        return
    contents.flushing = contents.unflushed
    contents.unflushed.first = NULL
    contents.flush.operation = IO_FLUSH
    contents.flush.frame_count = 0
    io_push(&contents.flush, flush_done, contents, 0)
    if bdev_submit(contents.base, &contents.flush) == SUBMIT_DONE:
        contents.flush_answered = True
        turn_due(contents.turns, &contents.turn)


cdef int flush_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    end_flush(<contents_t*>context)
    return FRAME_TAKEN


cdef void end_flush(contents_t* contents) noexcept nogil:
    cdef claim_t* claim = contents.flushing.first
    cdef claim_t* following
    contents.flushing.first = NULL
    while claim != NULL:
        following = claim.next
        claim.status = min(contents.flush.status, 0)
        contents.made(contents, claim)
        claim = following
    begin_flush(contents)


# --- control -------------------------------------------------------------------------------

cdef class Contents:
    def __init__(self, Channel base, uint64_t cluster_bytes):
        cdef uint32_t i
        cdef copier_t* copier
        self.base = base
        self.turns = engine_of(base.reactor, Turns)
        self.raw.base = &base.raw
        self.raw.turns = &self.turns.raw
        self.raw.turn.run = run
        self.raw.cluster_bytes = cluster_bytes
        self.raw.cached = (base.bdev.raw.flags & BDEV_VOLATILE_CACHE) != 0
        self.memory = mmap(NULL, COPIERS * COPY_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise HostError("no memory to copy the clusters of a store", ENOMEM)
        for i in range(COPIERS):
            copier = &self.raw.copiers[i]
            copier.buffer = <uint8_t*>self.memory + i * COPY_BYTES
            copier.contents = &self.raw
            copier.next = self.raw.free
            self.raw.free = copier

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, COPIERS * COPY_BYTES)
