"""CRC-32C by the processor's instruction, or by a table where it has none. Context: any."""

from libc.stdint cimport uint8_t, uint32_t

cdef extern from "drivebay/memory/platform.h" nogil:
    bint crc32c_is_native() noexcept
    uint32_t crc32c_native(uint32_t state, const uint8_t* data, size_t length) noexcept

cdef enum:
    POLYNOMIAL = 0x82F63B78     # bits reversed

cdef uint32_t[256] by_byte


cdef uint32_t by_table(uint32_t state, const uint8_t* data, size_t length) noexcept nogil:
    cdef size_t i
    for i in range(length):
        state = by_byte[(state ^ data[i]) & 0xFF] ^ (state >> 8)
    return state


cdef uint32_t crc32c_update(uint32_t value, const uint8_t* data, size_t length) noexcept nogil:
    """The value of what ``value`` stands for, and then these bytes."""
    if crc32c_is_native():
        return ~crc32c_native(~value, data, length)
    return ~by_table(~value, data, length)


def crc32c(data, uint32_t value=0):
    cdef const uint8_t[::1] view = data
    if view.shape[0] == 0:
        return value
    return crc32c_update(value, &view[0], view.shape[0])


def crc32c_by_table(data):
    """What processors without the instruction compute. For tests."""
    cdef const uint8_t[::1] view = data
    return <uint32_t>~by_table(~<uint32_t>0, &view[0], view.shape[0])


cdef void fill_table() noexcept:
    cdef uint32_t i, value
    for i in range(256):
        value = i
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        by_byte[i] = value


fill_table()
