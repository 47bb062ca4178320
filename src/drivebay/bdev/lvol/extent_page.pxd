"""Extent pages as they lie on disk: SPDK's struct spdk_blob_md_page with one descriptor.

One holds 512 entries of a table, in its first 2,073 bytes. The owner of a store's free space
overwrites it in place when entries come, and where blocks are smaller than the page a power cut
may leave some blocks of one write and some of another. So its last 512 bytes, which have SPDK's
checksum and nothing else that SPDK looks at, carry a *seal*: which entries are there, and which
of them no power cut can take back. Entries only come, so whatever blocks a torn page is made of,
the entries that its seal names are right, and a checksum says so.
Context: any.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.lvol.table cimport table_t

cdef uint32_t extent_page_count(const table_t* table, uint64_t page) noexcept nogil
cdef void extent_page_begin(uint8_t* image, const table_t* table, uint64_t page,
                            uint32_t count) noexcept nogil
cdef void extent_page_put(uint8_t* image, uint64_t index, uint32_t cluster) noexcept nogil
cdef uint32_t extent_page_get(const uint8_t* image, uint64_t index) noexcept nogil
cdef void extent_page_present(const uint8_t* image, uint64_t* entries) noexcept nogil
cdef void extent_page_end(uint8_t* image, const uint64_t* stable) noexcept nogil
