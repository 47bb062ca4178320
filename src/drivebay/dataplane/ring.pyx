"""The sentences for rings that were given up. Context: control."""

from libc.stdint cimport uint8_t, uint32_t

FAULTS = {
    FAULT_AVAIL_JUMP: "avail.idx jumped to {}, further than the ring is long",
    FAULT_HEAD_RANGE: "the avail ring names descriptor {}, which the ring does not have",
    FAULT_HEAD_TWICE: "descriptor {} was made available again while in flight",
    FAULT_NEXT_RANGE: "a descriptor's next is {}, which its table does not have",
    FAULT_CHAIN_LONG: "the chain at {} is longer than the ring, or loops",
    FAULT_ADDRESS: "a buffer in guest page {:#x} is outside the memory table",
    FAULT_INDIRECT_LENGTH: "an indirect table of {} bytes is no list that fits the ring",
    FAULT_INDIRECT_NESTED: "descriptor {} nests or continues an indirect table",
    FAULT_INDIRECT_OFF: "descriptor {} is indirect, which was not negotiated",
    FAULT_ORDER: "a readable buffer follows a writable one (flags {:#x})",
    FAULT_CALL_BLOCKED: "its call eventfd was made to block (value {})",
    FAULT_WATCH: "its kick eventfd cannot be watched (errno {})",
    FAULT_OVERCOMMIT: "a chain of more than {} descriptors is longer than the ring has room for",
    FAULT_INFLIGHT: "its inflight region has no place for the chain called {}; it was damaged",
    FAULT_INDIRECT_MIXED: "descriptor {} of a chain is indirect, and the chain has others",
}


cdef str fault_sentence(uint8_t fault, uint32_t value):
    """What control logs of a ring that was given up."""
    return FAULTS[fault].format(value)
