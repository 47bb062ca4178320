"""Drawing and mending extent pages: see extent_page.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from drivebay.bdev.lvol.table cimport BITS_WORDS, ENTRIES_A_PAGE, ClusterTable, table_t
from drivebay.memory.crc32c cimport crc32c_update

cdef extern from * nogil:
    int __builtin_ctzll(unsigned long long bits) noexcept

cdef enum:
    PAGE_BLOB_ID = 0
    PAGE_TYPE = 16
    PAGE_LENGTH = 17        # of what follows it
    PAGE_START = 21         # index of the first entry
    PAGE_ENTRIES = 25
    ENTRIES_END = 2073
    PAGE_NEXT = 4088
    PAGE_CRC = 4092
    PAGE_BYTES = 4096
    TYPE_EXTENT_PAGE = 6

# The seal, in the last block together with the page's checksum.
cdef enum:
    SEAL = 3584
    SEAL_BLOB_ID = 3592     # as at the beginning: pages change hands
    SEAL_PRESENT = 3600     # a bit for each entry that is there
    SEAL_STABLE = 3664      # and for those that a cut can't take back
    SEAL_CRC = 3728         # of the stable ones, what is before them, and the seal up to here

cdef uint64_t SEAL_MAGIC = 0x4C41455359414244   # "DBAYSEAL"


cdef uint32_t extent_page_count(const table_t* table, uint64_t page) noexcept nogil:
    """How many entries it has."""
    return <uint32_t>min(table.num_clusters - page * ENTRIES_A_PAGE, <uint64_t>ENTRIES_A_PAGE)


cdef void extent_page_begin(uint8_t* image, const table_t* table, uint64_t page,
                            uint32_t count) noexcept nogil:
    """All but the checksum, with the first ``count`` entries as the table has them."""
    cdef uint32_t first = <uint32_t>(page * ENTRIES_A_PAGE), length = 4 + 4 * count
    cdef uint32_t end = <uint32_t>-1
    memset(image, 0, PAGE_BYTES)
    memcpy(image + PAGE_BLOB_ID, &table.blob_id, 8)
    image[PAGE_TYPE] = TYPE_EXTENT_PAGE
    memcpy(image + PAGE_LENGTH, &length, 4)
    memcpy(image + PAGE_START, &first, 4)
    memcpy(image + PAGE_ENTRIES, table.clusters + first, 4 * count)
    memcpy(image + PAGE_NEXT, &end, 4)


cdef void extent_page_put(uint8_t* image, uint64_t index, uint32_t cluster) noexcept nogil:
    """Change the entry of a table's index."""
    memcpy(image + PAGE_ENTRIES + 4 * (index & (ENTRIES_A_PAGE - 1)), &cluster, 4)


cdef uint32_t extent_page_get(const uint8_t* image, uint64_t index) noexcept nogil:
    """What the entry of a table's index is."""
    cdef uint32_t cluster
    memcpy(&cluster, image + PAGE_ENTRIES + 4 * (index & (ENTRIES_A_PAGE - 1)), 4)
    return cluster


cdef void extent_page_present(const uint8_t* image, uint64_t* entries) noexcept nogil:
    """Which entries are there, a bit each. Bound: ENTRIES_A_PAGE."""
    cdef uint64_t word, bits, i
    cdef uint32_t[64] some
    for word in range(BITS_WORDS):
        memcpy(some, image + PAGE_ENTRIES + word * sizeof(some), sizeof(some))
        bits = 0
        for i in range(64):
            bits |= <uint64_t>(some[i] != 0) << i
        entries[word] = bits


cdef void keep_only(uint8_t* image, const uint64_t* entries) noexcept nogil:
    """Bound: ENTRIES_A_PAGE."""
    cdef uint64_t present[BITS_WORDS]
    cdef uint64_t word, bits
    extent_page_present(image, present)
    for word in range(BITS_WORDS):
        bits = present[word] & ~entries[word]
        while bits:
            extent_page_put(image, word * 64 + <uint64_t>__builtin_ctzll(bits), 0)
            bits &= bits - 1


cdef uint32_t seal_crc(const uint8_t* image, const uint64_t* stable) noexcept nogil:
    cdef uint8_t[PAGE_BYTES] kept
    cdef uint32_t crc
    memcpy(kept, image, ENTRIES_END)
    keep_only(kept, stable)
    crc = crc32c_update(0, kept, ENTRIES_END)
    return crc32c_update(crc, image + SEAL, SEAL_CRC - SEAL)


cdef void extent_page_end(uint8_t* image, const uint64_t* stable) noexcept nogil:
    """The seal and the checksum."""
    cdef uint64_t present[BITS_WORDS]
    cdef uint32_t crc
    extent_page_present(image, present)
    memcpy(image + SEAL, &SEAL_MAGIC, 8)
    memcpy(image + SEAL_BLOB_ID, image + PAGE_BLOB_ID, 8)
    memcpy(image + SEAL_PRESENT, present, sizeof(present))
    memcpy(image + SEAL_STABLE, stable, sizeof(present))
    crc = seal_crc(image, stable)
    memcpy(image + SEAL_CRC, &crc, 4)
    crc = crc32c_update(0, image, PAGE_CRC)
    memcpy(image + PAGE_CRC, &crc, 4)


def draw(ClusterTable table, uint64_t page, uint64_t num_clusters, added=None):
    cdef bytearray image = bytearray(PAGE_BYTES)
    cdef uint64_t start = page * ENTRIES_A_PAGE, count = min(num_clusters, table.raw.num_clusters)
    cdef uint64_t stable[BITS_WORDS]
    if count <= start:
        raise IndexError(f"extent page {page} of a table of {count} clusters")
    count = min(count - start, <uint64_t>ENTRIES_A_PAGE)
    extent_page_begin(<uint8_t*>image, &table.raw, page, <uint32_t>count)
    extent_page_present(<uint8_t*>image, stable)
    for index, cluster in (added or {}).items():
        if not start <= index < start + count:
            raise IndexError(f"cluster {index} in extent page {page}")
        extent_page_put(<uint8_t*>image, index, cluster)
    extent_page_end(<uint8_t*>image, stable)
    return bytes(image)


def seal(image):
    cdef bytearray sealed = bytearray(image[:PAGE_BYTES])
    cdef uint64_t present[BITS_WORDS]
    if len(sealed) != PAGE_BYTES:
        raise ValueError(f"an extent page of {len(sealed)} bytes")
    extent_page_present(<uint8_t*>sealed, present)
    extent_page_end(<uint8_t*>sealed, present)
    return bytes(sealed)


def is_sealed(image):
    return bytes(image[SEAL:SEAL_BLOB_ID]) == (<uint8_t*>&SEAL_MAGIC)[:8]


cdef uint32_t number_at(const uint8_t* image, size_t offset) noexcept nogil:
    cdef uint32_t number
    memcpy(&number, image + offset, 4)
    return number


def mend(image):
    cdef bytearray found = bytearray(image)
    cdef uint8_t* torn = <uint8_t*>found
    cdef uint64_t present[BITS_WORDS]
    cdef uint64_t stable[BITS_WORDS]
    if len(found) != PAGE_BYTES or torn[PAGE_TYPE] != TYPE_EXTENT_PAGE or not is_sealed(found):
        return None
    memcpy(torn + PAGE_BLOB_ID, torn + SEAL_BLOB_ID, 8)
    memcpy(present, torn + SEAL_PRESENT, sizeof(present))
    memcpy(stable, torn + SEAL_STABLE, sizeof(stable))
    keep_only(torn, present)
    if crc32c_update(0, torn, PAGE_CRC) != number_at(torn, PAGE_CRC):
        keep_only(torn, stable)
        if seal_crc(torn, stable) != number_at(torn, SEAL_CRC):
            return None
        memcpy(present, stable, sizeof(present))
        memset(torn + ENTRIES_END, 0, SEAL - ENTRIES_END)
    extent_page_end(torn, present)
    return bytes(found)
