"""What a verified sector holds: see vhost_user_pattern.pxd."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from *:
    """
    #define PATTERN_MAGIC 0x5941424556495244ULL  /* "DRIVEBAY" in memory */
    #define PATTERN_STEP 0x9E3779B97F4A7C15ULL
    """
    uint64_t PATTERN_MAGIC
    uint64_t PATTERN_STEP


cdef inline uint64_t pattern_seed(uint64_t address, uint64_t sequence, uint64_t run) noexcept nogil:
    cdef uint64_t seed = address * PATTERN_STEP ^ sequence * 0xC2B2AE3D27D4EB4FULL ^ run
    return (seed ^ seed >> 29) * 0xBF58476D1CE4E5B9ULL


cdef inline uint64_t pattern_word(uint64_t seed, uint64_t i) noexcept nogil:
    # No word depends on the one before, so the compiler works on several at once.
    cdef uint64_t word = seed + i * PATTERN_STEP
    return word ^ word >> 31


cdef void pattern_stamp(
    uint8_t* block, uint64_t length, uint64_t address, uint64_t sequence, uint64_t run
) noexcept nogil:
    cdef uint64_t* word = <uint64_t*> block
    cdef uint64_t* end = <uint64_t*> (block + length)
    cdef uint64_t i, seed
    while word < end:
        seed = pattern_seed(address, sequence, run)
        word[0] = PATTERN_MAGIC
        word[1] = address
        word[2] = sequence
        word[3] = run
        for i in range(4, PATTERN_SECTOR_WORDS):
            word[i] = pattern_word(seed, i)
        word += PATTERN_SECTOR_WORDS
        address += PATTERN_SECTOR_BYTES


cdef uint64_t pattern_expected(
    uint64_t i, uint64_t address, uint64_t sequence, uint64_t run
) noexcept nogil:
    """What word ``i`` of a sector must be."""
    if i == 0:
        return PATTERN_MAGIC
    if i == 1:
        return address
    if i == 2:
        return sequence
    if i == 3:
        return run
    return pattern_word(pattern_seed(address, sequence, run), i)


cdef int64_t pattern_check(
    const uint8_t* block, uint64_t length, uint64_t address, uint64_t sequence, uint64_t run,
    uint64_t* expected
) noexcept nogil:
    cdef const uint64_t* word = <const uint64_t*> block
    cdef uint64_t at = 0, i, seed, wrong
    while at < length:
        seed = pattern_seed(address + at, sequence, run)
        wrong = (word[0] ^ PATTERN_MAGIC) | (word[1] ^ (address + at))
        wrong |= (word[2] ^ sequence) | (word[3] ^ run)
        for i in range(4, PATTERN_SECTOR_WORDS):
            wrong |= word[i] ^ pattern_word(seed, i)
        if wrong:
            i = 0
            while word[i] == pattern_expected(i, address + at, sequence, run):
                i += 1
            expected[0] = pattern_expected(i, address + at, sequence, run)
            return <int64_t> (at + i * 8)
        word += PATTERN_SECTOR_WORDS
        at += PATTERN_SECTOR_BYTES
    return -1


cdef int64_t pattern_check_any(
    const uint8_t* block, uint64_t length, uint64_t address, uint64_t* expected
) noexcept nogil:
    cdef const uint64_t* word = <const uint64_t*> block
    return pattern_check(block, length, address, word[2], word[3], expected)


def stamp(buffer, uint64_t address, uint64_t sequence, uint64_t run):
    cdef unsigned char[::1] view = buffer
    pattern_stamp(&view[0], view.shape[0], address, sequence, run)


def check(buffer, uint64_t address, uint64_t sequence, uint64_t run):
    cdef const unsigned char[::1] view = buffer
    cdef uint64_t expected = 0
    cdef int64_t at = pattern_check(&view[0], view.shape[0], address, sequence, run, &expected)
    return None if at < 0 else (at, expected)


def check_any(buffer, uint64_t address):
    cdef const unsigned char[::1] view = buffer
    cdef uint64_t expected = 0
    cdef int64_t at = pattern_check_any(&view[0], view.shape[0], address, &expected)
    return None if at < 0 else (at, expected)
