"""Extent pages as they lie on disk: SPDK's struct spdk_blob_md_page with one descriptor.

One holds 512 entries of a table. They are drawn here for the owner of a store's free space and
for control. Context: any.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from drivebay.bdev.lvol.table cimport table_t

cdef uint32_t extent_page_count(const table_t* table, uint64_t page) noexcept nogil
cdef void extent_page_begin(uint8_t* image, const table_t* table, uint64_t page,
                            uint32_t count) noexcept nogil
cdef void extent_page_put(uint8_t* image, uint64_t index, uint32_t cluster) noexcept nogil
cdef uint32_t extent_page_get(const uint8_t* image, uint64_t index) noexcept nogil
cdef void extent_page_end(uint8_t* image) noexcept nogil
