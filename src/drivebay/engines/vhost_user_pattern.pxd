"""What a verified sector holds: its own address, a sequence number, and a pattern of both.

Context: any; pure. Every byte of a sector follows from four words, so one comparison
tells a lost write (old sequence), a misplaced one (foreign address), a torn one (sectors
of one block differ) and damaged bytes apart.

    word 0   PATTERN_MAGIC
    word 1   address of the sector on the disk, in bytes
    word 2   sequence: how often this run wrote the block
    word 3   run: a random number for each run
    4 .. 63  pattern of words 1, 2 and 3
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef enum:
    PATTERN_SECTOR_BYTES = 512
    PATTERN_SECTOR_WORDS = 64

# Fill a block that lies at ``address`` on the disk. Bound: length / 512 sectors.
cdef void pattern_stamp(
    uint8_t* block, uint64_t length, uint64_t address, uint64_t sequence, uint64_t run
) noexcept nogil

# The first byte offset at which the block is not what was stamped, or -1; a word of
# what was expected there goes to ``expected``. Bound: length / 512 sectors.
cdef int64_t pattern_check(
    const uint8_t* block, uint64_t length, uint64_t address, uint64_t sequence, uint64_t run,
    uint64_t* expected
) noexcept nogil

# The same for a block of unknown sequence and run: the first sector's own words are taken.
cdef int64_t pattern_check_any(
    const uint8_t* block, uint64_t length, uint64_t address, uint64_t* expected
) noexcept nogil
