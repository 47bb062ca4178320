"""Allocation on the owner reactor: see space.pxd. Nothing here is allocated on the path."""

from libc.errno cimport EIO, ENOMEM, ENOSPC
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)

from drivebay.bdev.base cimport (
    BDEV_VOLATILE_CACHE, FRAME_TAKEN, IO_WRITE, SUBMIT_DONE, Channel, io_push, io_t)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.bdev.lvol.contents cimport (
    Contents, claim_t, claims_append, claims_t, claims_take, contents_make, contents_t)
from drivebay.bdev.lvol.extent_page cimport (
    extent_page_begin, extent_page_count, extent_page_end, extent_page_get, extent_page_present,
    extent_page_put)
from drivebay.bdev.lvol.free_map cimport (
    FreeMap, bit_clear, bit_get, free_map_give, free_map_take)
from drivebay.bdev.lvol.table cimport (
    ENTRIES_A_PAGE, ClusterTable, stable_t, table_find, table_own, table_t)
from drivebay.bdev.lvol.turns cimport turn_due, turn_forget, turn_t
from drivebay.memory.platform cimport load_acquire_u64, store_release_u32, store_release_u64
from drivebay.reactor.mailbox cimport event_raise, mailbox_post, message_answer, message_t
from drivebay.reactor.reactor cimport reactor_t

from drivebay.errors import HostError


# --- claims: in, and out -------------------------------------------------------------------

cdef inline claim_t** bucket_of(space_t* space, const claim_t* claim) noexcept nogil:
    return &space.buckets[(claim.index ^ <uint64_t>claim.table >> 6) & (BUCKETS - 1)]


cdef claim_t* find_claim(space_t* space, const claim_t* like) noexcept nogil:
    """The one that already has a cluster for the same place."""
    cdef claim_t* claim = bucket_of(space, like)[0]
    while claim != NULL and (claim.index != like.index or claim.table != like.table):
        claim = claim.chain
    return claim


cdef void forget_claim(space_t* space, claim_t* claim) noexcept nogil:
    cdef claim_t** link = bucket_of(space, claim)
    while link[0] != claim:
        link = &link[0].chain
    link[0] = claim.chain


cdef void take(space_t* space, claim_t* claim) noexcept nogil:
    claims_append(&space.pending, claim)
    turn_due(space.turns, &space.turn)


cdef void act_claim(message_t* message, void* reactor) noexcept nogil:
    cdef claim_t* claim = <claim_t*>message.target
    take(<space_t*>claim.space, claim)


cdef void space_claim(space_t* space, claim_t* claim) noexcept nogil:
    """claim.granted() is called on claim.home, never from within."""
    claim.space = space
    claim.status = 0
    claim.cluster = 0
    claim.same = NULL
    claim.message.target = claim
    if claim.home == space.reactor:
        take(space, claim)
        return
    claim.message.act = act_claim
    mailbox_post(&space.reactor.mailbox, &claim.message)


cdef void act_granted(message_t* message, void* reactor) noexcept nogil:
    cdef claim_t* claim = <claim_t*>message.target
    claim.granted(claim)


cdef void answer(space_t* space, claim_t* claim, int32_t status) noexcept nogil:
    """It, and those who joined it, know. Bound: the channels of a volume."""
    cdef claim_t* following
    while claim != NULL:
        following = claim.same
        claim.status = status
        if claim.home == space.reactor:
            claim.granted(claim)
        else:
            claim.message.act = act_granted
            mailbox_post(&claim.home.mailbox, &claim.message)
        claim = following


cdef void settled(space_t* space) noexcept nogil:
    """One less that is active; the last one answers who wants to freeze."""
    cdef message_t* freezer = space.freezer
    space.active -= 1
    if space.active == 0 and freezer != NULL:
        space.freezer = NULL
        space.free.frozen = True
        message_answer(freezer, 0)


cdef void end(space_t* space, claim_t* claim, int32_t status) noexcept nogil:
    """A claim that had a cluster is over."""
    forget_claim(space, claim)
    answer(space, claim, status)
    settled(space)


cdef inline bint is_in_doubt(const space_t* space) noexcept nogil:
    """Control has to put something right before anybody gets a cluster."""
    return space.barred or space.failed != 0


cdef inline bint lacks_page(const claim_t* claim) noexcept nogil:
    return (claim.table.extent_pages != NULL
            and claim.table.extent_pages[claim.index // ENTRIES_A_PAGE] == 0)


cdef inline void want_clear_ones(space_t* space, const claim_t* claim) noexcept nogil:
    """Those that come next shall not have to clear their clusters one by one."""
    cdef uint32_t cluster = 0
    if not space.free.unclear and not table_find(claim.table, claim.index, &cluster):
        space.free.unclear = True
        event_raise(space.reactor.control, &space.event, SPACE_NEEDS)


cdef void admit(space_t* space, claim_t* claim) noexcept nogil:
    cdef table_t* table = claim.table
    cdef claim_t* leader
    cdef claim_t** bucket
    cdef uint64_t cluster
    if claim.index >= table.num_clusters:
        answer(space, claim, -EIO)
        return
    if table_own(table, claim.index):
        answer(space, claim, 0)
        return
    leader = find_claim(space, claim)
    if leader != NULL:
        claim.same = leader.same
        leader.same = claim
        return
    if is_in_doubt(space) or lacks_page(claim):
        claims_append(&space.needing, claim)
        event_raise(space.reactor.control, &space.event, SPACE_NEEDS)
        return
    cluster = free_map_take(space.free)
    if cluster == space.free.total:
        if not space.full_told:
            space.full_told = True
            event_raise(space.reactor.control, &space.event, SPACE_FULL)
        answer(space, claim, -ENOSPC)
        return
    claim.cluster = <uint32_t>cluster
    bucket = bucket_of(space, claim)
    claim.chain = bucket[0]
    bucket[0] = claim
    space.active += 1
    if not bit_get(space.free.zeroed, cluster):
        want_clear_ones(space, claim)
    contents_make(space.contents, claim, bit_get(space.free.zeroed, cluster))
    bit_clear(space.free.zeroed, cluster)


cdef void made(contents_t* contents, claim_t* claim) noexcept nogil:
    """The claim's cluster has its content, or could not have it."""
    cdef space_t* space = <space_t*>claim.space
    if claim.status < 0:
        free_map_give(space.free, claim.cluster)
        end(space, claim, claim.status)
    elif claim.table.extent_pages == NULL:
        claims_append(&space.unsaved, claim)
        event_raise(space.reactor.control, &space.event, SPACE_NEEDS)
        settled(space)
    else:
        claims_append(&space.ready, claim)
        turn_due(space.turns, &space.turn)


# --- extent pages --------------------------------------------------------------------------

cdef page_write_t* page_write_of(space_t* space, const claim_t* claim) noexcept nogil:
    """Where the claim may join, or NULL: its page is being written, or all are in use.

    One that failed means that there is no place for it until control has put that right.
    """
    cdef uint64_t page = claim.index // ENTRIES_A_PAGE
    cdef page_write_t* write
    cdef page_write_t* unused = NULL
    cdef int i
    for i in range(PAGE_WRITES):
        write = &space.writes[i]
        if write.table == NULL:
            unused = write
        elif write.table == claim.table and write.page == page:
            return write if write.failed or not write.sent else NULL
    if space.failed == PAGE_WRITES:
        return write
    if unused != NULL:
        unused.table = claim.table
        unused.page = page
        unused.claims.first = NULL
        unused.sent = False
    return unused


cdef void draw_page(page_write_t* write) noexcept nogil:
    """The page as it will be. Bound: ENTRIES_A_PAGE, some times."""
    cdef const table_t* table = write.table
    cdef const claim_t* claim = write.claims.first
    cdef stable_t* stable = &table.stable[write.page]
    extent_page_begin(write.image, table, write.page, extent_page_count(table, write.page))
    if load_acquire_u64(&write.space.pages_stable) >= stable.written:
        extent_page_present(write.image, stable.entries)
    while claim != NULL:
        extent_page_put(write.image, claim.index, claim.cluster)
        claim = claim.next
    extent_page_end(write.image, stable.entries)


cdef void send_page(page_write_t* write) noexcept nogil:
    cdef space_t* space = write.space
    draw_page(write)
    write.sent = True
    write.part.iov_base = write.image
    write.part.iov_len = space.page_bytes
    write.io.operation = IO_WRITE
    write.io.flags = 0
    write.io.iov = &write.part
    write.io.iov_count = 1
    write.io.offset = (space.pages_offset
                       + write.table.extent_pages[write.page] * space.page_bytes)
    write.io.length = space.page_bytes
    write.io.frame_count = 0
    io_push(&write.io, page_done, write, 0)
    if bdev_submit(space.base, &write.io) == SUBMIT_DONE:
        write.answered = True
        turn_due(space.turns, &space.turn)


cdef int page_done(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    end_page(<page_write_t*>context)
    return FRAME_TAKEN


cdef void end_page(page_write_t* write) noexcept nogil:
    """The page is written: the tables may say so. Bound: ENTRIES_A_PAGE.

    After an error nobody knows what the disk says: those clusters stay out of use, and the
    image is kept, until control has written the page again.
    """
    cdef space_t* space = write.space
    cdef table_t* table = write.table
    cdef claim_t* claim = write.claims.first
    cdef claim_t* following
    if write.io.status < 0:
        write.failed = True
        space.failed += 1
    else:
        write.table = NULL
    if write.io.status == 0 and space.base.bdev.flags & BDEV_VOLATILE_CACHE:
        store_release_u64(&space.pages_written, space.pages_written + 1)
        table.stable[write.page].written = space.pages_written
    while claim != NULL:
        following = claim.next
        if write.io.status == 0:
            table.allocated += 1
            store_release_u32(&table.clusters[claim.index], claim.cluster)
        end(space, claim, min(write.io.status, 0))
        claim = following
    if space.ready.first != NULL:
        turn_due(space.turns, &space.turn)


cdef void write_pages(space_t* space) noexcept nogil:
    """One write for each page that has claims ready, unless it is being written."""
    cdef claim_t* claim = space.ready.first
    cdef claim_t* following
    cdef page_write_t* write
    cdef int i
    space.ready.first = NULL
    while claim != NULL:
        following = claim.next
        write = page_write_of(space, claim)
        if write != NULL and write.failed:
            free_map_give(space.free, claim.cluster)
            end(space, claim, -EIO)
        else:
            claims_append(&space.ready if write == NULL else &write.claims, claim)
        claim = following
    for i in range(PAGE_WRITES):
        write = &space.writes[i]
        if write.table != NULL and not write.sent:
            send_page(write)


cdef void run(turn_t* turn) noexcept nogil:
    """What came in since the last turn, together."""
    cdef space_t* space = <space_t*>(<char*>turn - <size_t>&(<space_t*>NULL).turn)
    cdef claim_t* claim
    cdef claim_t* following
    cdef int i
    for i in range(PAGE_WRITES):
        if space.writes[i].answered:
            space.writes[i].answered = False
            end_page(&space.writes[i])
    if not space.frozen:
        claim = space.pending.first
        space.pending.first = NULL
        while claim != NULL:
            following = claim.next
            admit(space, claim)
            claim = following
    if space.ready.first != NULL:
        write_pages(space)


# --- freezing ------------------------------------------------------------------------------

cdef void act_freeze(message_t* message, void* reactor) noexcept nogil:
    cdef space_t* space = <space_t*>message.target
    space.frozen = True
    if space.active:
        space.freezer = message
    else:
        space.free.frozen = True
        message_answer(message, 0)


cdef void act_thaw(message_t* message, void* reactor) noexcept nogil:
    """What waited for control and did not get it is over."""
    cdef space_t* space = <space_t*>message.target
    cdef claims_t needing = space.needing, unsaved = space.unsaved
    cdef claim_t* claim
    space.frozen = space.free.frozen = False
    if space.free.free:
        space.full_told = False
    space.needing.first = space.unsaved.first = NULL
    claim = claims_take(&needing)
    while claim != NULL:
        if is_in_doubt(space):
            answer(space, claim, -EIO)
        elif lacks_page(claim):
            answer(space, claim, -ENOSPC)
        else:
            claims_append(&space.pending, claim)
        claim = claims_take(&needing)
    claim = claims_take(&unsaved)
    while claim != NULL:
        forget_claim(space, claim)
        if table_own(claim.table, claim.index) == claim.cluster:
            answer(space, claim, 0)
        else:
            free_map_give(space.free, claim.cluster)
            answer(space, claim, -EIO)
        claim = claims_take(&unsaved)
    if space.pending.first != NULL:
        turn_due(space.turns, &space.turn)
    message_answer(message, 0)


cdef void act_close(message_t* message, void* reactor) noexcept nogil:
    cdef space_t* space = <space_t*>message.target
    turn_forget(space.turns, &space.turn)
    turn_forget(space.turns, &space.contents.turn)
    message_answer(message, 0)


cdef void act_touch(message_t* message, void* reactor) noexcept nogil:
    cdef claim_t* claim = <claim_t*>message.target
    claim.home = <reactor_t*>reactor
    claim.granted = touched
    # What reaches the owner by a call needs no message of its own: it keeps control's.
    claim.message.owner = message
    space_claim(<space_t*>claim.space, claim)


cdef void touched(claim_t* claim) noexcept nogil:
    message_answer(<message_t*>claim.message.owner, claim.status)


cdef class Touch:
    """Control's claim; it lives until the answer is there."""

    cdef claim_t raw


# --- control -------------------------------------------------------------------------------

cdef class Space(EventOwner):
    def __init__(self, Channel base, uint64_t total_clusters, uint64_t cluster_bytes,
                 uint64_t pages_offset, uint64_t page_bytes, *, on_need, on_full):
        cdef int i
        self.base = base
        self.on_need = on_need
        self.on_full = on_full
        self.free = FreeMap(total_clusters)
        self.contents = Contents(base, cluster_bytes)
        self.contents.raw.made = made
        self.raw.reactor = &base.reactor.raw
        self.raw.base = &base.raw
        self.raw.contents = &self.contents.raw
        self.raw.turns = self.contents.raw.turns
        self.raw.turn.run = run
        self.raw.event.owner = <void*>self
        self.raw.cluster_bytes = cluster_bytes
        self.raw.pages_offset = pages_offset
        self.raw.page_bytes = page_bytes
        self.raw.free = &self.free.raw
        self.raw.frozen = True
        self.images = mmap(NULL, PAGE_WRITES * page_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.images == MAP_FAILED:
            self.images = NULL
            raise HostError("no memory for the metadata of a store", ENOMEM)
        for i in range(PAGE_WRITES):
            self.raw.writes[i].space = &self.raw
            self.raw.writes[i].image = <uint8_t*>self.images + i * page_bytes

    def __dealloc__(self):
        if self.images != NULL:
            munmap(self.images, PAGE_WRITES * self.raw.page_bytes)

    cdef int on_event(self, uint32_t bits) except -1:
        if bits & SPACE_NEEDS:
            self.on_need()
        if bits & SPACE_FULL:
            self.on_full()
        return 0

    def freeze(self):
        return self.base.reactor.ask(act_freeze, &self.raw, self)

    def thaw(self, *, bint barred=False, bint flushed=False):
        self.raw.barred = barred
        if flushed:
            store_release_u64(&self.raw.pages_stable, self.raw.pages_written)
        return self.base.reactor.ask(act_thaw, &self.raw, self)

    def close(self):
        return self.base.reactor.ask(act_close, &self.raw, self)

    @property
    def frozen(self):
        return bool(self.raw.frozen)

    @property
    def cluster_bytes(self):
        return self.raw.cluster_bytes

    def wants(self):
        cdef claim_t* claim
        self.free.require_frozen()
        found = []
        claim = self.raw.needing.first
        while claim != NULL:
            found.append((<ClusterTable>claim.table.object, claim.index, 0))
            claim = claim.next
        claim = self.raw.unsaved.first
        while claim != NULL:
            found.append((<ClusterTable>claim.table.object, claim.index, claim.cluster))
            claim = claim.next
        return found

    def failed_pages(self):
        cdef int i
        self.free.require_frozen()
        return [
            (<ClusterTable>self.raw.writes[i].table.object, self.raw.writes[i].page)
            for i in range(PAGE_WRITES) if self.raw.writes[i].failed
        ]

    def forget_failed(self):
        cdef page_write_t* write
        cdef uint64_t start, index
        cdef uint32_t cluster
        cdef int i
        self.free.require_frozen()
        for i in range(PAGE_WRITES):
            write = &self.raw.writes[i]
            if not write.failed:
                continue
            start = write.page * ENTRIES_A_PAGE
            for index in range(start, start + extent_page_count(write.table, write.page)):
                cluster = extent_page_get(write.image, index)
                if cluster and cluster != write.table.clusters[index]:
                    free_map_give(&self.free.raw, cluster)
            write.table = NULL
            write.failed = False
        self.raw.failed = 0

    def touch(self, ClusterTable table, uint64_t index):
        cdef Touch touch = Touch.__new__(Touch)
        touch.raw.space = &self.raw
        touch.raw.table = &table.raw
        touch.raw.index = index
        return self.base.reactor.ask(act_touch, &touch.raw, (touch, table, self))
