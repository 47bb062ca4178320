/* What C gives and Cython does not: ordered loads and stores on shared memory,
 * hints to the processor, its time stamp counter, and CHECK.
 *
 * Everything here is x86-64 or aarch64; only x86-64 is tested. Shared memory
 * means memory that a guest may change at any time: it is read once into a
 * local, through these functions, and checked there.
 */
#ifndef DRIVEBAY_PLATFORM_H
#define DRIVEBAY_PLATFORM_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static inline uint16_t load_acquire_u16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
static inline uint32_t load_acquire_u32(const void *p) { return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
static inline uint64_t load_acquire_u64(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
static inline void *load_acquire_ptr(const void *p) { return __atomic_load_n((void *const *)p, __ATOMIC_ACQUIRE); }

/* 16 bytes, aligned to 8: read once, and never again behind our back. A plain copy of a struct
 * lets the compiler read single fields anew after they were checked. */
static inline void load_once_16(void *into, const void *p) {
    ((uint64_t *)into)[0] = __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
    ((uint64_t *)into)[1] = __atomic_load_n((const uint64_t *)p + 1, __ATOMIC_RELAXED);
}

static inline uint8_t load_relaxed_u8(const void *p) { return __atomic_load_n((const uint8_t *)p, __ATOMIC_RELAXED); }
static inline uint16_t load_relaxed_u16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED); }
static inline uint32_t load_relaxed_u32(const void *p) { return __atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED); }
static inline uint64_t load_relaxed_u64(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED); }

static inline void store_release_u8(void *p, uint8_t v) { __atomic_store_n((uint8_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_u16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_u32(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_u64(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
static inline void store_release_ptr(void *p, void *v) { __atomic_store_n((void **)p, v, __ATOMIC_RELEASE); }
static inline void store_relaxed_u16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED); }
static inline void store_relaxed_u64(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED); }

static inline void *exchange_ptr(void *p, void *v) { return __atomic_exchange_n((void **)p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t exchange_u32(void *p, uint32_t v) { return __atomic_exchange_n((uint32_t *)p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t fetch_or_u32(void *p, uint32_t v) { return __atomic_fetch_or((uint32_t *)p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t fetch_or_u64(void *p, uint64_t v) { return __atomic_fetch_or((uint64_t *)p, v, __ATOMIC_ACQ_REL); }
static inline int compare_exchange_ptr(void *p, void *expected, void *desired) {
    return __atomic_compare_exchange_n((void **)p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int compare_exchange_u32(void *p, uint32_t expected, uint32_t desired) {
    return __atomic_compare_exchange_n((uint32_t *)p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int compare_exchange_u64(void *p, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n((uint64_t *)p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Orders everything before against everything after, loads behind stores too. */
static inline void fence_seq_cst(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline void prefetch_read(const void *p) { __builtin_prefetch(p, 0, 3); }

#if defined(__x86_64__)
/* The compiler's own would only read here: not every x86-64 has the instruction, but to those
 * that do not it is a no-op. */
static inline void prefetch_write(const void *p) { __asm__ volatile("prefetchw %0" ::"m"(*(const char *)p)); }
static inline void cpu_pause(void) { __builtin_ia32_pause(); }
static inline uint64_t tsc_read(void) { return __builtin_ia32_rdtsc(); }
#elif defined(__aarch64__)
static inline void prefetch_write(const void *p) { __builtin_prefetch(p, 1, 3); }
static inline void cpu_pause(void) { __asm__ volatile("yield" ::: "memory"); }
static inline uint64_t tsc_read(void) {
    uint64_t v;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(v));
    return v;
}
#else
#error "Drivebay runs on x86-64 and aarch64"
#endif

/* CRC-32C over bytes, without the inversions at its ends. */
#if defined(__x86_64__)
static inline int crc32c_is_native(void) { return __builtin_cpu_supports("sse4.2"); }
__attribute__((target("sse4.2"))) static inline uint32_t crc32c_native(uint32_t state, const uint8_t *data, size_t length) {
    uint64_t wide = state, word;
    for (; length >= sizeof(word); data += sizeof(word), length -= sizeof(word)) {
        __builtin_memcpy(&word, data, sizeof(word));
        wide = __builtin_ia32_crc32di(wide, word);
    }
    for (; length; data++, length--)
        wide = __builtin_ia32_crc32qi((uint32_t)wide, *data);
    return (uint32_t)wide;
}
#else
static inline int crc32c_is_native(void) { return 0; }
static inline uint32_t crc32c_native(uint32_t state, const uint8_t *data, size_t length) {
    (void)data, (void)length;
    return state;
}
#endif

/* Our own invariants only: a guest's mistake is never a reason to abort. */
#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (__builtin_expect(!(condition), 0)) {                                             \
            fprintf(stderr, "drivebay: broken invariant: %s (%s:%d)\n", #condition, __FILE__, __LINE__); \
            abort();                                                                         \
        }                                                                                    \
    } while (0)

#endif
