"""Map a front end's memory, translate its addresses, and survive its truncation.

Mapping and unmapping run in control or a worker thread. The one thing here that
runs anywhere is the SIGBUS handler: a front end that truncates the file behind
its memory makes the next access fault, in whichever thread touches it. The
handler puts anonymous memory over the whole region, marks it broken and rings
control, so that only the session which did it ends.
"""

from cpython.mem cimport PyMem_Calloc
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ,
    PROT_WRITE, mmap, munmap,
)
from posix.signal cimport SA_NODEFER, SA_SIGINFO, sigaction, sigaction_t, siginfo_t
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport write

from drivebay.memory.platform cimport (
    exchange_u32, load_acquire_u32, load_acquire_u64, store_release_u32, store_release_u64,
)

from typing import NamedTuple

from drivebay.errors import HostError, PeerError, StateError

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct c_statfs "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, c_statfs* out)

cdef extern from "<sys/mman.h>" nogil:
    int MADV_DONTDUMP
    int madvise(void* addr, size_t length, int advice)

cdef extern from "<signal.h>" nogil:
    int SIGBUS
    int sigemptyset(void* set)

cdef enum:
    TMPFS_MAGIC = 0x01021994
    HUGETLBFS_MAGIC = 0x958458F6
    PAGE_BYTES = 4096
    MAX_MAPPINGS = 8192

# Each mapping in the process, for the handler: start is 0 while the place is free.
cdef struct mapping_slot_t:
    uint64_t start
    uint64_t end
    uint32_t broken

cdef mapping_slot_t* slots = <mapping_slot_t*>PyMem_Calloc(MAX_MAPPINGS, sizeof(mapping_slot_t))
cdef list free_slots = list(range(MAX_MAPPINGS - 1, -1, -1))
cdef uint32_t slots_used = 0
cdef uint32_t broken_pending = 0
cdef int broken_doorbell = -1
cdef sigaction_t former_action
cdef bint handler_installed = False
cdef uint32_t last_generation = 0

live_tables = {}


cdef void on_sigbus(int number, siginfo_t* info, void* context) noexcept nogil:
    """Context: any thread, as a signal handler: only system calls and plain stores."""
    cdef uint64_t address = <uint64_t>info.si_addr
    cdef uint64_t start, end, ring = 1
    cdef uint32_t i
    for i in range(load_acquire_u32(&slots_used)):
        start = load_acquire_u64(&slots[i].start)
        end = load_acquire_u64(&slots[i].end)
        # Looked at again: control may be giving the place to another mapping meanwhile.
        if (start == 0 or address < start or address >= end
                or load_acquire_u64(&slots[i].start) != start):
            continue
        mmap(<void*>start, end - start, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0)
        store_release_u32(&slots[i].broken, 1)
        store_release_u32(&broken_pending, 1)
        if broken_doorbell >= 0:
            write(broken_doorbell, &ring, sizeof(ring))
        return
    # Not guest memory: a fault of our own, which the former action shall have.
    sigaction(number, &former_action, NULL)


cdef void set_broken_doorbell(int fd) noexcept nogil:
    global broken_doorbell
    broken_doorbell = fd


cdef void drop_broken_doorbell(int fd) noexcept nogil:
    """The owner is about to close it, and the number may be another file's next."""
    global broken_doorbell
    if broken_doorbell == fd:
        broken_doorbell = -1


cdef int report_broken() except -1:
    """Tell the owners of tables whose memory broke. Context: control. Returns how many."""
    cdef int told = 0
    cdef MemoryTable table
    if exchange_u32(&broken_pending, 0) == 0:
        return 0
    for table in list(live_tables.values()):
        if table.on_broken is not None and not table.reported and table.broken:
            table.reported = True
            told += 1
            table.on_broken()
    return told


def install_sigbus_handler():
    global handler_installed
    cdef sigaction_t action
    if handler_installed:
        return
    memset(&action, 0, sizeof(action))
    action.sa_sigaction = on_sigbus
    action.sa_flags = SA_SIGINFO | SA_NODEFER
    sigemptyset(&action.sa_mask)
    if sigaction(SIGBUS, &action, &former_action) != 0:
        raise HostError("cannot install the SIGBUS handler", errno)
    handler_installed = True


def mapped_regions():
    return MAX_MAPPINGS - len(free_slots)


class Region(NamedTuple):
    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int


cdef class Mapping:
    """One mmap of a front end's file, shared by the tables that hold the same region."""

    cdef uint64_t base
    cdef uint64_t length
    cdef uint64_t skip
    cdef int slot
    cdef int tables
    cdef tuple key

    def __cinit__(self, key, uint64_t mmap_offset, uint64_t size, int fd, uint64_t page):
        global slots_used
        cdef void* base
        cdef uint64_t start = mmap_offset & ~(page - 1)
        self.key = key
        self.slot = -1
        self.skip = mmap_offset - start
        self.length = (self.skip + size + page - 1) & ~(page - 1)
        if not free_slots:
            raise PeerError(f"no room for another region: {MAX_MAPPINGS} are mapped already")
        place = free_slots.pop()    # before the GIL is let go: others map, too
        with nogil:
            base = mmap(NULL, self.length, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_NORESERVE, fd, <long>start)
        if base == MAP_FAILED:
            free_slots.append(place)
            raise HostError(
                f"cannot map a region of {size} bytes at offset {mmap_offset:#x} of guest memory",
                errno)
        madvise(base, self.length, MADV_DONTDUMP)
        self.base = <uint64_t>base
        self.slot = place
        slots[self.slot].end = self.base + self.length
        slots[self.slot].broken = 0
        store_release_u64(&slots[self.slot].start, self.base)
        if <uint32_t>self.slot >= slots_used:
            store_release_u32(&slots_used, self.slot + 1)

    cdef bint is_usable(self) noexcept:
        return self.slot >= 0 and not load_acquire_u32(&slots[self.slot].broken)

    cdef void unmap(self) noexcept:
        if self.slot < 0:
            return
        store_release_u64(&slots[self.slot].start, 0)
        with nogil:
            munmap(<void*>self.base, self.length)
        free_slots.append(self.slot)
        self.slot = -1

    def __dealloc__(self):
        self.unmap()


def check_region(region, tuple earlier):
    """Refuse what cannot be mapped or would be ambiguous. Raises: PeerError."""
    limit = 1 << 64
    name = f"memory region at guest address {region.guest_addr:#x}"
    if region.size == 0:
        raise PeerError(f"{name} is empty")
    for what, start in (("guest address", region.guest_addr), ("user address", region.user_addr),
                        ("mmap offset", region.mmap_offset)):
        if start + region.size >= limit:
            raise PeerError(f"{name}: {what} {start:#x} plus size {region.size:#x} wraps")
    for other in earlier:
        for what, a, b in (("guest", region.guest_addr, other.guest_addr),
                           ("user", region.user_addr, other.user_addr)):
            if a < b + other.size and b < a + region.size:
                raise PeerError(f"{name} overlaps another one in {what} addresses")


cdef tuple identify(object region):
    """(mapping key, page size) of the file behind a region. Raises: PeerError, HostError."""
    cdef struct_stat info
    cdef c_statfs fs
    cdef int fd = region.fd
    cdef unsigned long kind
    if fstat(fd, &info) != 0 or fstatfs(fd, &fs) != 0:
        raise HostError("cannot look at the descriptor of guest memory", errno)
    kind = <unsigned long>fs.f_type & 0xFFFFFFFF
    if kind != TMPFS_MAGIC and kind != HUGETLBFS_MAGIC:
        raise PeerError(
            f"guest memory is on a file system of type {kind:#x}; only memfd, tmpfs and hugetlbfs "
            "memory is served, because a page fault elsewhere can stop everybody's disks",
            hint="start QEMU with -object memory-backend-memfd,share=on")
    end = region.mmap_offset + region.size
    if end > info.st_size:
        raise PeerError(
            f"memory region at guest address {region.guest_addr:#x} ends at byte {end} of its "
            f"file, which has {info.st_size}")
    page = fs.f_bsize if kind == HUGETLBFS_MAGIC else PAGE_BYTES
    return (info.st_dev, info.st_ino, region.mmap_offset, region.size), page


cdef bint memtable_read(
    const memtable_t* table, uint64_t guest_addr, void* into, uint64_t length
) noexcept nogil:
    """Copy out of guest memory, over region borders. False: some of it is outside."""
    cdef uint64_t part
    cdef uint8_t* host
    while length:
        part = length
        host = memtable_resolve(table, guest_addr, &part)
        if host == NULL:
            return False
        memcpy(into, host, part)
        into = <uint8_t*>into + part
        guest_addr += part
        length -= part
    return True


cdef Mapping kept_mapping(MemoryTable previous, object region):
    """The mapping of a region that comes without a descriptor. Raises: PeerError."""
    cdef Mapping mapping
    if previous is not None:
        for other, mapping in zip(previous.regions, previous.mappings):
            if other[:4] == region[:4]:
                return mapping
    raise PeerError(
        f"memory region at guest address {region.guest_addr:#x} came without a descriptor")


cdef class MemoryTable:
    def __init__(self, regions, MemoryTable previous=None, on_broken=None):
        global last_generation
        regions = tuple(regions)
        if not regions:
            raise PeerError("a memory table without regions")
        if len(regions) > MEMTABLE_MAX_REGIONS:
            raise PeerError(
                f"{len(regions)} memory regions, but at most {MEMTABLE_MAX_REGIONS} fit")
        self.on_broken = on_broken
        self.mappings = []
        try:
            self.map_all(regions, previous)
        except BaseException:
            self.let_go()
            raise
        self.regions = regions
        self.raw.count = len(regions)
        last_generation += 1
        self.raw.generation = last_generation
        live_tables[last_generation] = self

    cdef int map_all(self, tuple regions, MemoryTable previous) except -1:
        """Each mapping is counted as soon as it is taken: another thread may release previous."""
        cdef Mapping mapping
        known = {}
        if previous is not None:
            for mapping in previous.mappings:
                known[mapping.key] = mapping
        for i, region in enumerate(regions):
            check_region(region, regions[:i])
            if region.fd < 0:
                mapping = kept_mapping(previous, region)
            else:
                key, page = identify(region)
                mapping = known.get(key)
                if mapping is None or not mapping.is_usable():
                    mapping = Mapping(key, region.mmap_offset, region.size, region.fd, page)
            mapping.tables += 1
            self.mappings.append(mapping)
            self.raw.regions[i] = region_t(
                region.guest_addr, region.size, region.user_addr,
                <uint8_t*>mapping.base + mapping.skip)
        return 0

    cdef void let_go(self) noexcept:
        cdef Mapping mapping
        for mapping in self.mappings:
            mapping.tables -= 1
            if mapping.tables == 0:
                mapping.unmap()
        self.mappings.clear()

    @property
    def generation(self):
        return self.raw.generation

    @property
    def broken(self):
        cdef Mapping mapping
        for mapping in self.mappings:
            if mapping.slot >= 0 and load_acquire_u32(&slots[mapping.slot].broken):
                return True
        return False

    cdef uint8_t* host_of(self, uint64_t user_addr, uint64_t length, str what) except NULL:
        cdef uint32_t i
        cdef uint64_t offset
        if self.released:
            raise StateError(f"{what}: the memory table was released")
        for i in range(self.raw.count):
            offset = user_addr - self.raw.regions[i].user_addr
            if offset < self.raw.regions[i].size and length <= self.raw.regions[i].size - offset:
                return self.raw.regions[i].host + offset
        raise PeerError(
            f"{what}: {length} bytes at user address {user_addr:#x} are in no memory region")

    def resolve_user(self, user_addr, length, what):
        return <uint64_t>self.host_of(user_addr, length, what)

    def read(self, uint64_t guest_addr, uint64_t length):
        out = bytearray(length)
        cdef uint8_t[::1] view = out
        if self.released:
            raise StateError("the memory table was released")
        if length and not memtable_read(&self.raw, guest_addr, &view[0], length):
            raise PeerError(f"{length} bytes at guest address {guest_addr:#x} are outside memory")
        return bytes(out)

    def write(self, uint64_t guest_addr, const uint8_t[::1] data):
        cdef uint64_t done = 0, part
        cdef uint64_t length = data.shape[0]
        cdef uint8_t* host
        if self.released:
            raise StateError("the memory table was released")
        while done < length:
            part = length - done
            host = memtable_resolve(&self.raw, guest_addr + done, &part)
            if host == NULL:
                raise PeerError(
                    f"{length} bytes at guest address {guest_addr:#x} are outside memory")
            memcpy(host, &data[done], part)
            done += part

    def release(self):
        if self.released:
            return
        self.released = True
        self.raw.count = 0
        live_tables.pop(self.raw.generation, None)
        self.let_go()
