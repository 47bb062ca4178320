"""Drawing extent pages: see extent_page.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from drivebay.bdev.lvol.table cimport ENTRIES_A_PAGE, ClusterTable, table_t
from drivebay.memory.crc32c cimport crc32c_update

cdef enum:
    PAGE_BLOB_ID = 0
    PAGE_TYPE = 16
    PAGE_LENGTH = 17        # of what follows it
    PAGE_START = 21         # index of the first entry
    PAGE_ENTRIES = 25
    PAGE_NEXT = 4088
    PAGE_CRC = 4092
    PAGE_BYTES = 4096
    TYPE_EXTENT_PAGE = 6


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


cdef void extent_page_end(uint8_t* image) noexcept nogil:
    """The checksum over it all."""
    cdef uint32_t crc = crc32c_update(0, image, PAGE_CRC)
    memcpy(image + PAGE_CRC, &crc, 4)


def draw(ClusterTable table, uint64_t page, uint64_t num_clusters):
    cdef bytearray image = bytearray(PAGE_BYTES)
    cdef uint64_t start = page * ENTRIES_A_PAGE, count = min(num_clusters, table.raw.num_clusters)
    if count <= start:
        raise IndexError(f"extent page {page} of a table of {count} clusters")
    count = min(count - start, <uint64_t>ENTRIES_A_PAGE)
    extent_page_begin(<uint8_t*>image, &table.raw, page, <uint32_t>count)
    extent_page_end(<uint8_t*>image)
    return bytes(image)
