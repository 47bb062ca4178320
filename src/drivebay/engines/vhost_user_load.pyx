"""The load generator's loop: see vhost_user_load.pxd."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.time cimport timespec
from posix.unistd cimport read

from drivebay.engines.vhost_user_histogram cimport Histogram, histogram_record
from drivebay.engines.vhost_user_pattern cimport (
    PATTERN_SECTOR_BYTES, pattern_check, pattern_check_any, pattern_stamp,
)
from drivebay.engines.vhost_user_queue cimport (
    SLOT_BAD, DriverQueue, driver_queue_arm, driver_queue_data, driver_queue_publish,
    driver_queue_put, driver_queue_ready, driver_queue_silence, driver_queue_take,
)
from drivebay.memory.platform cimport (
    cpu_pause, load_relaxed_u64, prefetch_write, store_relaxed_u64, tsc_read,
)
from drivebay.wire.virtio_blk cimport (
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
)

from time import monotonic_ns, sleep

from drivebay.errors import UsageError

cdef extern from "<sched.h>" nogil:
    int sched_yield()

# ppoll is GNU's; Python's header asks for such extensions.
cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    ctypedef struct sigset_t "sigset_t"
    int ppoll(pollfd* fds, unsigned long nfds, const timespec* timeout, const sigset_t* mask)

cdef extern from *:
    ctypedef unsigned long long uint128_t "unsigned __int128"

cdef enum:
    POLLS_PER_CLOCK = 64         # empty polls between two looks at the clock
    POLLS_PER_YIELD = 4096       # empty polls before somebody else may have the core
    GATHER_MOST = 8              # completions that are waited for
    GATHER_DEPTH = 8             # below this depth nothing is
    SLEEP_MOST_NS = 100_000_000  # longest sleep: so often ``stop`` and ``abandon`` are looked at


cdef inline uint64_t load_random(load_t* load) noexcept nogil:
    """xorshift64: period 2^64 - 1, and three shifts are all it costs."""
    cdef uint64_t x = load.random_state
    x ^= x << 13
    x ^= x >> 7
    x ^= x << 17
    load.random_state = x
    return x


cdef inline uint64_t load_pick_block(load_t* load) noexcept nogil:
    cdef uint64_t block
    if load.random:
        return <uint64_t> ((<uint128_t> load_random(load) * load.num_blocks) >> 64)
    block = load.next_block
    load.next_block = block + 1 if block + 1 < load.num_blocks else 0
    return block


cdef inline uint8_t load_pick_kind(load_t* load) noexcept nogil:
    if load.read_share == 65536:
        return KIND_READ
    if load.read_share == 0:
        return KIND_WRITE
    return KIND_READ if load_random(load) >> 48 < load.read_share else KIND_WRITE


cdef bint load_claim_block(load_t* load, uint64_t* block) noexcept nogil:
    """Verifying: the next block without a request in flight, from the picked one on.

    Bound: the range, once; it holds more blocks than requests can be in flight.
    """
    cdef uint64_t at = block[0], tries = 0
    while tries < load.num_blocks:
        tries += 1
        if not load.sequences[at] & BLOCK_BUSY:
            load.sequences[at] |= BLOCK_BUSY
            block[0] = at
            return True
        at = at + 1 if at + 1 < load.num_blocks else 0
    return False


cdef bint load_next_known_block(load_t* load, uint64_t* block) noexcept nogil:
    """Re-reading: the next block whose content is known. Bound: the rest of the range."""
    while load.next_block < load.num_blocks:
        block[0] = load.next_block
        load.next_block += 1
        if load.sequences[block[0]]:
            load.sequences[block[0]] |= BLOCK_BUSY
            return True
    load.exhausted = True
    return False


cdef bint load_prepare_verified(
    load_t* load, load_queue_t* q, uint16_t slot, uint8_t kind, uint64_t* block
) noexcept nogil:
    """Choose a block that is not busy, and stamp what is written to it."""
    cdef uint8_t* data = driver_queue_data(q.vq, slot)
    cdef uint32_t sequence, at = 0
    if load.reread:
        if not load_next_known_block(load, block):
            return False
    elif not load_claim_block(load, block):
        return False
    if kind == KIND_READ:
        # A read that transfers nothing must not find what a write left in the buffer.
        while at < load.block_bytes:
            (<uint64_t*> (data + at))[0] = 0
            at += PATTERN_SECTOR_BYTES
    else:
        sequence = (load.sequences[block[0]] & BLOCK_SEQUENCE) + 1
        if sequence > BLOCK_SEQUENCE:
            sequence = 1
        q.sequence[slot] = sequence
        pattern_stamp(
            data, load.block_bytes,
            (load.first_sector + block[0] * load.block_sectors) * 512, sequence, load.run)
    return True


cdef inline bint load_issue(load_t* load, load_queue_t* q, uint64_t due) noexcept nogil:
    """Put one request of the workload into a free slot, which there must be."""
    cdef uint16_t slot = q.free[q.free_first & q.free_mask]
    cdef uint64_t block
    cdef uint8_t kind
    if load.flush_every and q.writes >= load.flush_every:
        q.writes = 0
        q.kind[slot] = KIND_FLUSH
        driver_queue_put(q.vq, slot, VIRTIO_BLK_T_FLUSH, 0, 0)
    else:
        kind = load_pick_kind(load)
        block = 0 if load.reread else load_pick_block(load)
        if load.sequences != NULL and not load_prepare_verified(load, q, slot, kind, &block):
            return False
        q.block[slot] = block
        q.kind[slot] = kind
        q.writes += kind
        driver_queue_put(
            q.vq, slot, VIRTIO_BLK_T_OUT if kind == KIND_WRITE else VIRTIO_BLK_T_IN,
            load.first_sector + block * load.block_sectors, load.block_bytes)
    q.due[slot] = due
    q.free_first += 1
    load.inflight += 1
    return True


cdef void load_report_mismatch(
    load_t* load, load_queue_t* q, uint16_t slot, int64_t at, uint64_t expected, uint32_t sequence
) noexcept nogil:
    load.mismatches += 1
    if load.mismatches > 1:
        return
    load.first_mismatch.address = (
        (load.first_sector + q.block[slot] * load.block_sectors) * 512 + <uint64_t> at)
    load.first_mismatch.expected = expected
    load.first_mismatch.got = (<uint64_t*> (driver_queue_data(q.vq, slot) + at))[0]
    load.first_mismatch.sequence = sequence
    load.first_mismatch.word = <uint32_t> (at % 512 // 8)


cdef void load_verify(load_t* load, load_queue_t* q, uint16_t slot, uint8_t status) noexcept nogil:
    """Check what a read brought, remember what a write left; the block is free again."""
    cdef uint64_t block = q.block[slot], address, expected = 0
    cdef uint32_t sequence = load.sequences[block] & BLOCK_SEQUENCE
    cdef int64_t at = -1
    if q.kind[slot] == KIND_WRITE:
        # After a failed write the block may hold either content, or a part of both.
        load.sequences[block] = q.sequence[slot] if status == VIRTIO_BLK_S_OK else 0
        return
    load.sequences[block] = sequence
    if status != VIRTIO_BLK_S_OK or (sequence == 0 and not load.self_check):
        return
    address = (load.first_sector + block * load.block_sectors) * 512
    if sequence:
        at = pattern_check(
            driver_queue_data(q.vq, slot), load.block_bytes, address, sequence, load.run,
            &expected)
    else:
        at = pattern_check_any(driver_queue_data(q.vq, slot), load.block_bytes, address, &expected)
    load.verified += 1
    if at >= 0:
        load_report_mismatch(load, q, slot, at, expected, sequence)


cdef inline uint16_t load_gather(load_t* load, load_queue_t* q, uint16_t ready) noexcept nogil:
    """Closed loop: wait for a few more from a target that hands back one by one, but fast.

    Each look at its used index takes the cache line from the target's core; looking for
    every single completion slows both. The target has work in the meantime, as at most a
    quarter of what is in flight is waited for, and no longer than gather_ticks at the pace
    of late: a target that needs more than that for a request is never waited for.
    """
    cdef uint16_t inflight = q.vq.slots - <uint16_t> (q.free_end - q.free_first)
    cdef uint16_t wanted = inflight // 4 if inflight < 4 * GATHER_MOST else GATHER_MOST
    cdef uint64_t until
    if ready < wanted and (wanted - ready) * q.pace_ticks <= load.gather_ticks:
        until = tsc_read() + (wanted - ready) * q.pace_ticks
        while tsc_read() < until:
            cpu_pause()
        ready = driver_queue_ready(q.vq)
    load.now = tsc_read()
    q.pace_ticks = (3 * q.pace_ticks + (load.now - q.reaped) // ready) >> 2
    q.reaped = load.now
    return ready


cdef inline uint16_t load_reap(load_t* load, load_queue_t* q) noexcept nogil:
    """Take all completions of a queue. Bound: the requests in flight."""
    cdef uint16_t ready = driver_queue_ready(q.vq), i, slot
    cdef uint8_t status, kind
    if ready == 0:
        return 0
    if load.gather_ticks and q.vq.slots >= GATHER_DEPTH:
        ready = load_gather(load, q, ready)
    else:
        load.now = tsc_read()
    for i in range(ready):
        slot = driver_queue_take(q.vq)
        if slot == SLOT_BAD:
            load.fault = FAULT_RING
            return i
        # The slot is soon written again, and the device's core holds its header.
        prefetch_write(&q.vq.headers[slot])
        status = q.vq.statuses[slot]
        kind = q.kind[slot]
        if status == VIRTIO_BLK_S_OK:
            load.ok[kind] += 1
        else:
            load.errors[status] += 1
        histogram_record(load.latency[kind], load.now - q.due[slot])
        if load.sequences != NULL and kind != KIND_FLUSH:
            load_verify(load, q, slot, status)
        q.free[q.free_end & q.free_mask] = slot
        q.free_end += 1
    load.batches += 1
    load.inflight -= ready
    store_relaxed_u64(&load.completions, load.completions + ready)
    return ready


cdef inline void load_refill(load_t* load, load_queue_t* q) noexcept nogil:
    """Closed loop: use every free slot. Bound: the depth."""
    while q.free_first != q.free_end:
        if not load_issue(load, q, load.now):
            break
    driver_queue_publish(q.vq)


cdef void load_issue_due(load_t* load) noexcept nogil:
    """Open loop: issue what is due, on the queues by turns. Bound: queues × depth."""
    cdef uint32_t looked = 0, i
    cdef uint64_t due
    cdef load_queue_t* q
    load.now = tsc_read()
    due = load.begun + <uint64_t> (load.issued * load.interval_ticks)
    while due <= load.now and looked < load.num_queues:
        q = &load.queues[load.next_queue]
        load.next_queue = load.next_queue + 1 if load.next_queue + 1 < load.num_queues else 0
        if q.free_first == q.free_end or not load_issue(load, q, due):
            looked += 1
            continue
        looked = 0
        load.issued += 1
        due = load.begun + <uint64_t> (load.issued * load.interval_ticks)
    for i in range(load.num_queues):
        driver_queue_publish(load.queues[i].vq)


cdef uint64_t load_sleep_ns(load_t* load, bint issuing) noexcept nogil:
    """How long there is nothing to do but to wait for a call."""
    cdef uint64_t due, now
    cdef double left
    if not issuing or load.interval_ticks == 0:
        return SLEEP_MOST_NS
    now = tsc_read()
    due = load.begun + <uint64_t> (load.issued * load.interval_ticks)
    if due <= now:
        # Late already: every slot is taken, so only a completion helps.
        return SLEEP_MOST_NS
    left = (due - now) * load.ns_per_tick
    return <uint64_t> left if left < SLEEP_MOST_NS else SLEEP_MOST_NS


cdef void load_sleep(load_t* load, bint issuing) noexcept nogil:
    """Sleep until the target calls, as a guest's driver does. Bound: queues."""
    cdef uint32_t i
    cdef uint64_t count = 0
    cdef bint ready = False
    cdef timespec timeout
    for i in range(load.num_queues):
        ready |= driver_queue_arm(load.queues[i].vq)
    if not ready:
        timeout.tv_sec = 0
        timeout.tv_nsec = <long> load_sleep_ns(load, issuing)
        ppoll(load.calls, load.num_queues, &timeout, NULL)
    for i in range(load.num_queues):
        if load.calls[i].revents & POLLIN:
            read(load.calls[i].fd, &count, 8)
            load.calls[i].revents = 0
        driver_queue_silence(load.queues[i].vq)
    load.now = tsc_read()


cdef void load_rest(load_t* load, uint32_t idle, bint issuing) noexcept nogil:
    """Nothing was complete: wait a little, in the way that is asked for."""
    if load.ns_per_tick:
        load_sleep(load, issuing)
        return
    cpu_pause()
    if idle % POLLS_PER_CLOCK == 0:
        load.now = tsc_read()
    if idle % POLLS_PER_YIELD == 0:
        sched_yield()


cdef void load_run(load_t* load) noexcept nogil:
    """One turn: take what is complete on each queue, refill it at once, look at the clock."""
    cdef bint issuing = True
    cdef uint32_t i, reaped, idle = 0
    cdef load_queue_t* q
    load.begun = tsc_read()
    load.now = load.begun
    for i in range(load.num_queues):
        if load.interval_ticks == 0:
            load_refill(load, &load.queues[i])
    while not load_relaxed_u64(&load.abandon) and not load.fault:
        reaped = 0
        for i in range(load.num_queues):
            q = &load.queues[i]
            if load_reap(load, q):
                reaped += 1
                if issuing and load.interval_ticks == 0:
                    load_refill(load, q)
        if issuing and load.interval_ticks != 0:
            load_issue_due(load)
        if reaped:
            idle = 0
        else:
            idle += 1
            load_rest(load, idle, issuing)
        if issuing:
            issuing = (
                load.now - load.begun < load.duration_ticks and not load.exhausted
                and not load_relaxed_u64(&load.stop))
        elif load.inflight == 0:
            break
    load.ended = tsc_read()


cdef class Load:
    def __cinit__(
        self, queues, *, first_sector, num_blocks, block_bytes, random, read_share,
        flush_every, verify, self_check, run,
    ):
        cdef load_t* load = &self.load
        memset(load, 0, sizeof(load_t))
        self.owners = list(queues)
        self.latency = [Histogram() for _ in range(KINDS)]
        load.num_queues = len(queues)
        load.first_sector = first_sector
        load.num_blocks = num_blocks
        load.block_bytes = block_bytes
        load.block_sectors = block_bytes // 512
        load.random = random
        load.read_share = read_share
        load.flush_every = flush_every
        load.self_check = self_check
        load.run = run
        load.random_state = run | 1
        load.queues = <load_queue_t*> calloc(load.num_queues, sizeof(load_queue_t))
        load.calls = <pollfd*> calloc(load.num_queues, sizeof(pollfd))
        if load.queues == NULL or load.calls == NULL:
            raise MemoryError
        for i in range(load.num_queues):
            self.bind_queue(&load.queues[i], self.owners[i])
            load.calls[i].fd = load.queues[i].vq.call_fd
            load.calls[i].events = POLLIN
        for i in range(KINDS):
            load.latency[i] = &(<Histogram> self.latency[i]).histogram
        if verify:
            # Untouched pages of it cost nothing, however large the disk.
            load.sequences = <uint32_t*> calloc(num_blocks, sizeof(uint32_t))
            if load.sequences == NULL:
                raise MemoryError

    cdef int bind_queue(self, load_queue_t* q, DriverQueue owner) except -1:
        cdef uint32_t slots = owner.queue.slots, slot, entries = 1
        if self.load.block_bytes > owner.queue.slot_bytes:
            raise UsageError(
                f"a block of {self.load.block_bytes} bytes does not fit a request "
                f"(at most {owner.queue.slot_bytes} do)",
                field="bs")
        while entries < slots:
            entries *= 2
        q.vq = &owner.queue
        q.due = <uint64_t*> calloc(slots, sizeof(uint64_t))
        q.block = <uint64_t*> calloc(slots, sizeof(uint64_t))
        q.sequence = <uint32_t*> calloc(slots, sizeof(uint32_t))
        q.kind = <uint8_t*> calloc(slots, sizeof(uint8_t))
        q.free = <uint16_t*> calloc(entries, sizeof(uint16_t))
        if NULL in (q.due, q.block, q.sequence, q.kind, q.free):
            raise MemoryError
        q.free_mask = <uint16_t> (entries - 1)
        q.free_end = <uint16_t> slots
        for slot in range(slots):
            q.free[slot] = <uint16_t> slot
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        cdef load_queue_t* q
        free(self.load.sequences)
        free(self.load.calls)
        if self.load.queues == NULL:
            return
        for i in range(self.load.num_queues):
            q = &self.load.queues[i]
            free(q.due)
            free(q.block)
            free(q.sequence)
            free(q.kind)
            free(q.free)
        free(self.load.queues)

    def run(self, duration_ticks, interval_ticks, gather_ticks, ns_per_tick=0.0):
        self.load.ns_per_tick = ns_per_tick
        self.load.duration_ticks = duration_ticks
        self.load.gather_ticks = gather_ticks
        self.load.interval_ticks = interval_ticks
        with nogil:
            load_run(&self.load)

    def reread(self):
        self.load.read_share = 65536
        self.load.flush_every = 0
        self.load.reread = True
        self.load.stop = 0
        self.load.next_block = 0
        self.load.interval_ticks = 0
        self.load.gather_ticks = 0
        self.load.duration_ticks = <uint64_t> -1
        self.latency = [Histogram() for _ in range(KINDS)]
        for i in range(KINDS):
            self.load.latency[i] = &(<Histogram> self.latency[i]).histogram
        with nogil:
            load_run(&self.load)

    def stop(self):
        store_relaxed_u64(&self.load.stop, 1)

    def abandon(self):
        store_relaxed_u64(&self.load.abandon, 1)

    @property
    def completions(self):
        return load_relaxed_u64(&self.load.completions)

    @property
    def inflight(self):
        return load_relaxed_u64(&self.load.inflight)

    def counters(self):
        cdef load_t* load = &self.load
        return {
            "inflight": load.inflight,
            "elapsed_ticks": load.ended - load.begun,
            "batches": load.batches,
            "broken_ring": load.fault == FAULT_RING,
            "reads": load.ok[KIND_READ],
            "writes": load.ok[KIND_WRITE],
            "flushes": load.ok[KIND_FLUSH],
            "errors": {status: load.errors[status] for status in range(256) if load.errors[status]},
            "verified": load.verified,
            "mismatches": load.mismatches,
        }

    def first_mismatch(self):
        if self.load.mismatches == 0:
            return None
        return self.load.first_mismatch


def tick_rate():
    cdef uint64_t begun = tsc_read(), ended
    started = monotonic_ns()
    sleep(0.02)
    ended = tsc_read()
    return (ended - begun) * 1e9 / (monotonic_ns() - started)
