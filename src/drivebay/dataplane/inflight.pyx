"""Marking what is in flight, and finding it again after a crash.

A kill may come between any two stores, and the next target must make sense of what it
finds. So the stores below are in a fixed order, each a release: the compiler moves none
before another. What decides is one store each time: split, used.idx and the entry's mark;
packed, the flags of the first used descriptor, and the two words at their offsets in the
region that hold the free list's heads and the used indexes, new and old side by side.

Packed, between giving back and showing: the specification's free list would begin with
the entries that were given back already, and a chain taken now would overwrite them. Here
a chain is taken behind them, so a batch may take and give as it likes. The rules for
reconnecting find the same in either case.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcpy, memset

from drivebay.memory.guest_memory cimport MemoryTable
from drivebay.memory.platform cimport (
    load_relaxed_u8, load_relaxed_u16, load_relaxed_u64, store_relaxed_u16,
    store_release_u8, store_release_u16, store_release_u32, store_release_u64,
)
from drivebay.wire.virtio_ring cimport (
    VIRTQ_MAX_SIZE, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED, virtq_inflight_packed,
    virtq_inflight_packed_entry, virtq_inflight_split, virtq_inflight_split_entry,
    virtq_packed_desc,
)

import os

from drivebay.errors import PeerError, StateError
from drivebay.memory.guest_memory import Region

cdef enum:
    VERSION = 1         # of the region's layout; 0 is a new one
    ALIGNMENT = 64      # of each queue's part
    TAIL_SIZE = 64      # what the target keeps for itself behind the queues
    WRAP = 1 << 15      # the wrap counter's bit in an index of a packed ring

INFLIGHT_TAIL_BYTES = TAIL_SIZE
INFLIGHT_ALIGNMENT = ALIGNMENT


# --- while requests run --------------------------------------------------------------------

cdef int inflight_take_split(inflight_t* inflight, uint16_t head) noexcept nogil:
    if head >= inflight.num:
        return -1
    store_release_u64(&inflight.split.desc[head].counter, inflight.counter)
    store_release_u8(&inflight.split.desc[head].inflight, 1)
    inflight.counter += 1
    return head


cdef inline void store_heads(inflight_t* inflight, uint16_t now, uint16_t old) noexcept nogil:
    """free_head and old_free_head, in one store."""
    store_release_u32(&inflight.packed.free_head, now | <uint32_t>old << 16)


cdef inline void store_used(inflight_t* inflight) noexcept nogil:
    """The used index and its wrap counter, and the old ones, in one store."""
    store_release_u64(&inflight.packed.used_idx,
                      inflight.used | <uint64_t>inflight.shown << 16
                      | <uint64_t>inflight.used_wrap << 32 | <uint64_t>inflight.shown_wrap << 40)


cdef int inflight_take_packed(
    inflight_t* inflight, const virtq_packed_desc* descs, uint16_t count, uint16_t id
) noexcept nogil:
    """Nothing of it counts until old_free_head has passed it. Bound: count."""
    cdef virtq_inflight_packed_entry* desc = inflight.packed.desc
    cdef uint16_t head = inflight.free, at = head, last = head, i
    for i in range(count):
        if at >= inflight.num:
            return -1
        last = at
        desc[at].addr = descs[i].addr
        desc[at].len = descs[i].len
        desc[at].flags = descs[i].flags
        desc[at].id = descs[i].id
        at = load_relaxed_u16(&desc[at].next)
    desc[last].id = id
    desc[head].last = last
    desc[head].num = count
    store_release_u64(&desc[head].counter, inflight.counter)
    store_release_u8(&desc[head].inflight, 1)
    if inflight.filled:
        store_release_u16(&desc[inflight.given_end].next, at)
        store_heads(inflight, inflight.given, at)
    else:
        store_heads(inflight, at, at)
    inflight.free = at
    inflight.counter += 1
    return head


cdef void inflight_give(inflight_t* inflight, uint16_t entry) noexcept nogil:
    cdef virtq_inflight_packed_entry* desc
    cdef uint16_t last, num
    if inflight.split != NULL:
        store_release_u16(&inflight.split.desc[entry].next,
                          load_relaxed_u16(&inflight.split.last_batch_head))
        store_release_u16(&inflight.split.last_batch_head, entry)
        inflight.filled += 1
        return
    desc = inflight.packed.desc
    last = load_relaxed_u16(&desc[entry].last)
    num = load_relaxed_u16(&desc[entry].num)
    if last >= inflight.num or num > inflight.size:
        last = entry    # nonsense: it spoils the region of those who wrote it, and no more
        num = 0
    store_release_u16(&desc[last].next, inflight.given if inflight.filled else inflight.free)
    if not inflight.filled:
        inflight.given_end = last
    inflight.given = entry
    inflight.filled += 1
    store_heads(inflight, entry, inflight.free)
    inflight.used += num
    if inflight.used >= inflight.size:
        inflight.used -= inflight.size
        inflight.used_wrap ^= 1
    store_used(inflight)


cdef void inflight_settle(inflight_t* inflight, uint16_t used) noexcept nogil:
    """Bound: what was given back since the last time."""
    cdef uint16_t _i, at
    if inflight.filled == 0:
        return
    if inflight.split != NULL:
        at = load_relaxed_u16(&inflight.split.last_batch_head)
        for _i in range(inflight.filled):
            if at >= inflight.num:
                break
            store_release_u8(&inflight.split.desc[at].inflight, 0)
            at = load_relaxed_u16(&inflight.split.desc[at].next)
        store_release_u16(&inflight.split.used_idx, used)
    else:
        settle_packed(inflight, used)
    inflight.filled = 0


cdef inline void settle_packed(inflight_t* inflight, uint16_t used) noexcept nogil:
    cdef virtq_inflight_packed_entry* desc = inflight.packed.desc
    cdef uint16_t _i, at = inflight.given
    for _i in range(inflight.filled):
        if at >= inflight.num:
            break
        store_release_u8(&desc[at].inflight, 0)
        at = load_relaxed_u16(&desc[at].last)
        if at >= inflight.num:
            break
        at = load_relaxed_u16(&desc[at].next)
    inflight.free = inflight.given
    inflight.used = inflight.shown = used & ~<uint16_t>WRAP
    inflight.used_wrap = inflight.shown_wrap = used >> 15
    store_heads(inflight, inflight.free, inflight.free)
    store_used(inflight)


# --- after a crash -------------------------------------------------------------------------

cdef int by_counter(const void* a, const void* b) noexcept nogil:
    cdef uint64_t left = (<const recovered_t*>a).counter, right = (<const recovered_t*>b).counter
    return (left > right) - (left < right)


cdef class InflightQueue:
    def __dealloc__(self):
        free(self.chains)

    cdef int begin(self, uint16_t size, uint16_t version, uint16_t desc_num) except -1:
        """Returns: 1 for a region that nobody has used yet. Raises: PeerError, StateError."""
        if self.recovered:
            raise StateError(f"queue {self.index}: its inflight region was looked at already")
        self.recovered = True
        if size > self.raw.num:
            raise PeerError(
                f"queue {self.index} has a ring of {size} entries, but its inflight region was "
                f"made for {self.raw.num}")
        if version == 0:
            return 1
        if version != VERSION:
            raise self.nonsense(f"has version {version} (must be {VERSION})")
        if not size <= desc_num <= self.raw.num:
            raise self.nonsense(
                f"keeps {desc_num} descriptors (must be {size} to {self.raw.num})")
        self.resumed = True
        return 0

    def nonsense(self, str what):
        return PeerError(
            f"queue {self.index}: its inflight region {what}; it was damaged, or never one",
            hint="restart the guest: it begins with a new region")

    cdef int keep(self, recovered_t* found, uint16_t count) except -1:
        """In order of arrival; what comes later follows. Raises: MemoryError."""
        qsort(found, count, sizeof(recovered_t), by_counter)
        self.raw.counter = found[count - 1].counter + 1 if count else 0
        self.chains = <recovered_t*>calloc(count + 1, sizeof(recovered_t))
        if self.chains == NULL:
            raise MemoryError
        memcpy(self.chains, found, count * sizeof(recovered_t))
        self.count = count
        return 0

    cdef int recover_split(self, uint16_t size, uint16_t used, uint16_t base) except -1:
        cdef virtq_inflight_split* region = self.raw.split
        cdef recovered_t found[VIRTQ_MAX_SIZE]
        cdef uint16_t i, _i, at, batch, count = 0
        cdef uint8_t mark
        if self.begin(size, load_relaxed_u16(&region.version), load_relaxed_u16(&region.desc_num)):
            memset(region, 0, sizeof(virtq_inflight_split)
                   + self.raw.num * sizeof(virtq_inflight_split_entry))
            store_relaxed_u16(&region.desc_num, self.raw.num)
            # The ring may have run before without a region: it need not begin with 0.
            store_release_u16(&region.used_idx, used)
            store_release_u16(&region.version, VERSION)
            self.base = base
            return self.keep(found, 0)
        # The last batch was shown, but its marks may still stand.
        batch = used - load_relaxed_u16(&region.used_idx)
        at = load_relaxed_u16(&region.last_batch_head)
        if batch <= self.raw.num:
            for _i in range(batch):
                if at >= self.raw.num:
                    raise self.nonsense(f"lists descriptor {at} in its last batch")
                store_release_u8(&region.desc[at].inflight, 0)
                at = load_relaxed_u16(&region.desc[at].next)
        for i in range(self.raw.num):
            mark = load_relaxed_u8(&region.desc[i].inflight)
            if mark == 0:
                continue
            if mark != 1 or i >= size:
                raise self.nonsense(f"marks descriptor {i} of {size} with {mark}")
            found[count] = recovered_t(load_relaxed_u64(&region.desc[i].counter), i, 1, i)
            count += 1
        if batch > self.raw.num and count:
            raise self.nonsense(f"is {batch} used entries behind a ring of {size}")
        store_release_u16(&region.used_idx, used)
        self.base = <uint16_t>(used + count)
        return self.keep(found, count)

    cdef int recover_packed(
        self, virtq_packed_desc* ring, uint16_t size, uint32_t base
    ) except -1:
        cdef recovered_t found[VIRTQ_MAX_SIZE]
        cdef uint8_t seen[VIRTQ_MAX_SIZE]
        cdef uint16_t i, at, count = 0
        cdef uint32_t taken = 0, avail
        cdef uint8_t wrap
        cdef virtq_inflight_packed* region = self.raw.packed
        if (base & 0x7FFF) >= size or (base >> 16 & 0x7FFF) >= size:
            raise PeerError(
                f"queue {self.index} has base {base:#x}, outside its ring of {size} entries")
        self.raw.size = size
        if self.begin(size, load_relaxed_u16(&region.version), load_relaxed_u16(&region.desc_num)):
            prepare_packed(&self.raw, base >> 16)
            self.base = base
            return self.keep(found, 0)
        self.roll(ring)
        memset(seen, 0, sizeof(seen))
        at = self.raw.free
        while at < self.raw.num:
            if seen[at]:
                raise self.nonsense(f"has a free list that comes back to entry {at}")
            seen[at] = 1
            store_release_u8(&region.desc[at].inflight, 0)
            at = load_relaxed_u16(&region.desc[at].next)
        for i in range(self.raw.num):
            if load_relaxed_u8(&region.desc[i].inflight) == 0 or seen[i]:
                continue
            self.chain(i, seen, &found[count])
            taken += found[count].count
            count += 1
        if taken > size:
            raise self.nonsense(f"has {taken} descriptors in flight in a ring of {size}")
        clean_ring(ring, &self.raw, taken)
        self.taken = taken
        avail = self.raw.used + taken
        wrap = self.raw.used_wrap
        if avail >= size:
            avail -= size
            wrap ^= 1
        self.base = (avail | <uint32_t>wrap << 15 | <uint32_t>self.raw.used << 16
                     | <uint32_t>self.raw.used_wrap << 31)
        return self.keep(found, count)

    cdef int roll(self, virtq_packed_desc* ring) except -1:
        """Finish what was shown before the crash, or undo it. Raises: PeerError."""
        cdef virtq_inflight_packed* region = self.raw.packed
        cdef uint64_t used = load_relaxed_u64(&region.used_idx)
        cdef uint16_t new = <uint16_t>used, old = <uint16_t>(used >> 16)
        cdef uint8_t new_wrap = <uint8_t>(used >> 32), old_wrap = <uint8_t>(used >> 40)
        cdef uint16_t head = load_relaxed_u16(&region.old_free_head)
        if new >= self.raw.size or old >= self.raw.size or new_wrap > 1 or old_wrap > 1:
            raise self.nonsense(f"has used indexes {new} and {old}, wrap counters {new_wrap} and "
                                f"{old_wrap}, in a ring of {self.raw.size}")
        if (new != old or new_wrap != old_wrap) and not is_available(
                load_relaxed_u16(&ring[old].flags), old_wrap):
            old = new
            old_wrap = new_wrap
            head = load_relaxed_u16(&region.free_head)
        self.raw.free = head
        self.raw.used = self.raw.shown = old
        self.raw.used_wrap = self.raw.shown_wrap = old_wrap
        # In this order: a kill between the two finds the same as before.
        store_heads(&self.raw, head, head)
        store_used(&self.raw)
        return 0

    cdef int chain(self, uint16_t entry, uint8_t* seen, recovered_t* found) except -1:
        """Check one marked chain. Raises: PeerError. Bound: the region's entries."""
        cdef virtq_inflight_packed_entry* desc = self.raw.packed.desc
        cdef uint16_t _i, at = entry, end = entry
        cdef uint16_t num = load_relaxed_u16(&desc[entry].num)
        cdef virtq_packed_desc last
        cdef uint16_t beyond = 0
        if not 1 <= num <= self.raw.size:
            raise self.nonsense(f"has a chain of {num} descriptors in a ring of {self.raw.size}")
        for _i in range(num):
            if at >= self.raw.num or seen[at]:
                raise self.nonsense(f"has a chain at {entry} that leads to entry {at}")
            seen[at] = 1
            end = at
            inflight_descriptor(&self.raw, at, &last, &beyond)
            at = beyond
        if load_relaxed_u16(&desc[entry].last) != end:
            raise self.nonsense(f"has a chain at {entry} that does not end where it says")
        found[0] = recovered_t(load_relaxed_u64(&desc[entry].counter), entry, num, last.id)
        return 0


cdef inline bint is_available(uint16_t flags, uint8_t wrap) noexcept nogil:
    """As the driver made it available in the lap of that wrap counter: nobody has used it."""
    cdef uint16_t wanted = VIRTQ_PACKED_DESC_F_AVAIL if wrap else VIRTQ_PACKED_DESC_F_USED
    return flags & (VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED) == wanted


cdef void prepare_packed(inflight_t* inflight, uint32_t used) noexcept nogil:
    """A new region: all entries are free. used: the used index, bit 15 its wrap counter."""
    cdef virtq_inflight_packed* region = inflight.packed
    cdef uint16_t i
    memset(region, 0, sizeof(virtq_inflight_packed)
           + inflight.num * sizeof(virtq_inflight_packed_entry))
    for i in range(inflight.num):
        region.desc[i].next = i + 1     # the last one's is no entry
    region.desc_num = inflight.num
    inflight.used = inflight.shown = used & 0x7FFF
    inflight.used_wrap = inflight.shown_wrap = used >> 15 & 1
    store_heads(inflight, 0, 0)
    store_used(inflight)
    store_release_u16(&region.version, VERSION)


cdef void clean_ring(
    virtq_packed_desc* ring, const inflight_t* inflight, uint32_t taken
) noexcept nogil:
    """Take back used flags that were written before the first one's, which was not.

    The driver looks at the first one and goes no further. Later it would take the others
    for used. Bound: the ring's size.
    """
    cdef uint16_t at = inflight.used, flags
    cdef uint8_t wrap = inflight.used_wrap
    cdef uint32_t _i
    for _i in range(taken):
        flags = load_relaxed_u16(&ring[at].flags)
        if not is_available(flags, wrap):
            flags &= ~<uint16_t>(VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED)
            flags |= VIRTQ_PACKED_DESC_F_AVAIL if wrap else VIRTQ_PACKED_DESC_F_USED
            store_release_u16(&ring[at].flags, flags)
        at += 1
        if at == inflight.size:
            at = 0
            wrap ^= 1


# --- the region ----------------------------------------------------------------------------

def inflight_queue_bytes(int queue_size, bint packed):
    if packed:
        size = sizeof(virtq_inflight_packed) + queue_size * sizeof(virtq_inflight_packed_entry)
    else:
        size = sizeof(virtq_inflight_split) + queue_size * sizeof(virtq_inflight_split_entry)
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


cdef class InflightRegion:
    def __init__(
        self, *, int fd, mmap_size, mmap_offset, int num_queues, int queue_size, bint packed,
        on_broken=None,
    ):
        needed = num_queues * inflight_queue_bytes(queue_size, packed)
        if not 1 <= queue_size <= VIRTQ_MAX_SIZE or num_queues < 1:
            raise PeerError(
                f"an inflight region for {num_queues} queues of {queue_size} entries (1 to "
                f"{VIRTQ_MAX_SIZE} fit)")
        if mmap_offset % ALIGNMENT:
            raise PeerError(
                f"the inflight region begins at {mmap_offset:#x} of its file (must be a multiple "
                f"of {ALIGNMENT})")
        if mmap_size < needed:
            raise PeerError(
                f"the inflight region has {mmap_size} bytes, but {num_queues} queues of "
                f"{queue_size} entries need {needed}")
        bytes_there = os.fstat(fd).st_size
        if mmap_offset + mmap_size > bytes_there:
            raise PeerError(
                f"the inflight region ends at byte {mmap_offset + mmap_size} of its file, which "
                f"has {bytes_there}")
        self.has_tail = mmap_size >= needed + TAIL_SIZE
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.packed = packed
        size = needed + (TAIL_SIZE if self.has_tail else 0)
        try:
            self.table = MemoryTable((Region(0, size, 0, mmap_offset, fd),), None, on_broken)
        except PeerError as error:
            raise PeerError(f"the inflight region cannot be used: {error}") from error
        self.host = self.table.host_of(0, size, "the inflight region")

    def queue(self, int index):
        cdef InflightQueue queue = InflightQueue.__new__(InflightQueue)
        cdef uint8_t* part
        if not 0 <= index < self.num_queues:
            raise PeerError(
                f"queue {index} starts, but the inflight region has {self.num_queues} queues")
        part = self.host + index * <size_t>inflight_queue_bytes(self.queue_size, self.packed)
        queue.index = index
        queue.region = self
        queue.raw.num = self.queue_size
        if self.packed:
            queue.raw.packed = <virtq_inflight_packed*>part
        else:
            queue.raw.split = <virtq_inflight_split*>part
        return queue

    @property
    def tail_at(self):
        return self.num_queues * inflight_queue_bytes(self.queue_size, self.packed)

    def read_tail(self):
        return self.table.read(self.tail_at, TAIL_SIZE)

    def write_tail(self, data, int offset=0):
        if offset < 0 or offset + len(data) > TAIL_SIZE:
            raise ValueError(f"{len(data)} bytes at {offset} do not fit the tail")
        self.table.write(self.tail_at + offset, data)

    @property
    def broken(self):
        return self.table.broken

    def release(self):
        self.table.release()
