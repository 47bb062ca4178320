"""raid1: every base has everything; reads go to one, writes to all.

A leg is one base as a channel sees it. A write that a leg failed does not end before control
has taken that leg away everywhere, and written so into the superblocks: until then another
channel, or the next start, could read from it what was there before. Control can hold the
writes to a range (the window) while it copies that range from leg to leg.

Context: reactor, except the classes.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, channel_t
from drivebay.bdev.fanout cimport Fanout, fanout_t
from drivebay.reactor.io cimport io_list_t
from drivebay.reactor.mailbox cimport EventOwner, event_t, message_t

# event_t.bits
cdef enum:
    TROUBLE_WRITE = 1       # a leg failed a write, which waits for control
    TROUBLE_READ = 2        # a leg failed a read that another one had: see repair_t

cdef struct leg_t:
    channel_t* base         # NULL: none
    uint64_t data_offset    # bytes, on the base
    uint64_t reading        # bytes in flight
    uint32_t inflight       # children on the base, or on the one that was there before
    message_t* leaving      # answered when those are back
    bint failed             # a write, since control last asked
    bint reported           # control's copy of that

cdef struct repair_t:       # what a leg could not read
    uint64_t offset         # bytes, of the disk
    uint64_t length
    uint32_t leg
    uint32_t wanted         # set by the reactor, cleared by control

cdef struct mirror_t:       # one channel's
    fanout_t* fanout
    leg_t* legs
    uint32_t count
    uint32_t present        # legs that have a base
    uint32_t target         # the leg that is being rebuilt and can't be read; count: none
    uint64_t frontier       # writes from this byte on are not for the target yet
    uint64_t window_start
    uint64_t window_end     # 0: no window
    io_list_t held          # writes to the window
    uint32_t writes[2]      # in flight, by the epoch in which they began
    uint32_t epoch
    message_t* window       # answered when no write of the epoch before is left
    io_list_t suspended     # writes that a leg failed
    io_list_t judged        # those of them that control knows of
    event_t event
    repair_t repair

cdef class MirrorBdev(Bdev):
    cdef readonly object raid
    cdef list data_offsets
    cdef uint32_t count
    # What a channel that opens begins with.
    cdef uint32_t target
    cdef uint64_t frontier, window_start, window_end

cdef class Trouble(EventOwner):
    cdef MirrorChannel channel

cdef class MirrorChannel(Channel):
    cdef mirror_t mirror
    cdef Fanout fanout
    cdef Trouble trouble
