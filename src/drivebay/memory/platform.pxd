"""The processor's side of shared memory: see platform.h. Context: any."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

# Cython's own macros: which way a branch nearly always goes.
cdef extern from *:
    bint likely(bint condition) noexcept nogil
    bint unlikely(bint condition) noexcept nogil

cdef extern from "drivebay/memory/platform.h" nogil:
    uint16_t load_acquire_u16(const void* p) noexcept
    uint32_t load_acquire_u32(const void* p) noexcept
    uint64_t load_acquire_u64(const void* p) noexcept
    void* load_acquire_ptr(const void* p) noexcept
    void load_once_16(void* into, const void* p) noexcept
    uint8_t load_relaxed_u8(const void* p) noexcept
    uint16_t load_relaxed_u16(const void* p) noexcept
    uint32_t load_relaxed_u32(const void* p) noexcept
    uint64_t load_relaxed_u64(const void* p) noexcept
    void store_release_u8(void* p, uint8_t v) noexcept
    void store_release_u16(void* p, uint16_t v) noexcept
    void store_release_u32(void* p, uint32_t v) noexcept
    void store_release_u64(void* p, uint64_t v) noexcept
    void store_release_ptr(void* p, void* v) noexcept
    void store_relaxed_u16(void* p, uint16_t v) noexcept
    void store_relaxed_u64(void* p, uint64_t v) noexcept
    void* exchange_ptr(void* p, void* v) noexcept
    uint32_t exchange_u32(void* p, uint32_t v) noexcept
    uint32_t fetch_or_u32(void* p, uint32_t v) noexcept
    uint64_t fetch_or_u64(void* p, uint64_t v) noexcept
    bint compare_exchange_ptr(void* p, void* expected, void* desired) noexcept
    bint compare_exchange_u32(void* p, uint32_t expected, uint32_t desired) noexcept
    bint compare_exchange_u64(void* p, uint64_t expected, uint64_t desired) noexcept
    void fence_seq_cst() noexcept
    void prefetch_read(const void* p) noexcept
    void prefetch_write(const void* p) noexcept
    void cpu_pause() noexcept
    uint64_t tsc_read() noexcept
    void CHECK(bint condition) noexcept
