"""The load generator's loop: it keeps virtqueues full and measures.

Context: one thread of its own without the GIL, pinned to one core, polling. The thread
that waits for it reads the counters and sets ``stop`` or ``abandon``; nothing else is shared.
Never: allocates, raises; and never sleeps (it only yields its core after many empty polls)
unless it is to wait for the target's calls, as a guest does. While the target is away
it goes on looking: a target that comes back finds the rings as they are.

Closed loop (no rate): every completion is answered with a new request at once. Open loop
(a rate): requests fall due at fixed times, whatever the target does, and latency counts
from the time at which a request was due, so a stall is seen in full.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from drivebay.engines.vhost_user_histogram cimport histogram_t
from drivebay.engines.vhost_user_queue cimport DriverQueue, driver_queue_t

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents

cdef enum:
    KIND_READ = 0
    KIND_WRITE = 1
    KIND_FLUSH = 2
    KINDS = 3

cdef enum load_fault:
    FAULT_NONE = 0
    FAULT_RING = 1               # a used element that names no request in flight

cdef enum:
    BLOCK_BUSY = 0x80000000      # in ``sequences``: a request on the block is in flight
    BLOCK_SEQUENCE = 0x7FFFFFFF  # in ``sequences``: last one written; 0 = content unknown

# The first block that did not hold what was written to it.
cdef struct mismatch_t:
    uint64_t address             # of the wrong word on the disk, in bytes
    uint64_t expected
    uint64_t got
    uint64_t sequence            # expected sequence of the block; 0 = not known
    uint32_t word                # which word of the sector

cdef struct load_queue_t:
    driver_queue_t* vq
    uint64_t* due                # per slot: tick from which its latency counts
    uint64_t* block              # per slot: index of the block in the range
    uint32_t* sequence           # per slot: what the write in flight carries
    uint8_t* kind                # per slot
    uint16_t* free               # ring of free slots: recycled in order of completion
    uint16_t free_mask
    uint16_t free_first          # free-running
    uint16_t free_end            # free-running; free_end - free_first slots are free
    uint32_t writes              # since the last flush
    uint64_t reaped              # tick of the last completions
    uint64_t pace_ticks          # ticks for each completion, of late

cdef struct load_t:
    # What to do
    load_queue_t* queues
    uint32_t num_queues
    uint64_t first_sector
    uint64_t num_blocks
    uint32_t block_sectors
    uint32_t block_bytes
    bint random
    uint32_t read_share          # of 65,536
    uint32_t flush_every         # writes of a queue; 0 = never
    uint64_t duration_ticks
    double interval_ticks        # of the open loop; 0 = closed loop
    uint64_t gather_ticks        # longest wait for more completions; 0 = never wait
    double ns_per_tick           # sleep on the calls between completions; 0 = poll
    pollfd* calls                # one for each queue
    # Verification; sequences == NULL: none
    uint32_t* sequences          # per block
    uint64_t run
    bint self_check              # reads of unknown blocks must agree with themselves
    bint reread                  # read every block of known content once, and end
    # Shared with the thread that waits
    uint64_t stop                # take no new requests, end when none is in flight
    uint64_t abandon             # end now
    uint64_t completions
    # State
    uint64_t random_state
    uint64_t next_block
    uint64_t inflight
    uint64_t begun               # tick
    uint64_t now                 # tick
    uint64_t issued              # requests of the open loop so far
    uint32_t next_queue
    bint exhausted               # reread has seen every block
    # Results
    uint64_t ended               # tick
    uint64_t batches             # polls that found completions
    uint64_t fault
    uint64_t ok[KINDS]
    uint64_t errors[256]         # by status byte
    uint64_t verified            # blocks
    uint64_t mismatches          # blocks
    mismatch_t first_mismatch
    histogram_t* latency[KINDS]

# Run until the time is over, ``stop``, ``abandon`` or a fault.
cdef void load_run(load_t* load) noexcept nogil

cdef class Load:
    cdef load_t load
    cdef list owners             # the queues, kept alive
    cdef readonly list latency   # a Histogram for each kind
    cdef int bind_queue(self, load_queue_t* q, DriverQueue owner) except -1
