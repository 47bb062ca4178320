"""A volume on the path: one look at its table, then its base.

What has no cluster yet is read from its parents, another bdev or as zeroes, and waits for a
cluster when it is written. Context: reactor.
"""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Bdev, Channel, bdev_t, channel_t, io_t
from drivebay.bdev.fanout cimport Fanout, fanout_t
from drivebay.bdev.lvol.contents cimport claim_t
from drivebay.bdev.lvol.space cimport Space, space_t
from drivebay.bdev.lvol.table cimport ClusterTable, table_t
from drivebay.bdev.lvol.turns cimport Turns, turns_t
from drivebay.reactor.io cimport io_list_t

cdef enum:
    CLAIMS = 64             # clusters that one channel waits for at once

# A wish for one cluster, and the I/Os that wait for it.
cdef struct wait_t:
    claim_t claim           # first
    io_list_t waiting
    wait_t* next
    volume_t* volume

# channel.module of a volume's channel
cdef struct volume_t:
    channel_t* base
    channel_t* external     # NULL: none, or missing
    table_t** table         # the bdev's; changed by control when nothing is in flight
    space_t* space
    turns_t* turns
    fanout_t* fanout
    uint64_t cluster_bytes
    int shift               # of cluster_bytes; -1: no power of two
    bint cached             # the base may lose completed writes until a flush
    wait_t* free
    wait_t* waits[CLAIMS]   # by cluster
    io_list_t starved       # those that found no free one
    channel_t part          # where children go: not gated, no blocks, no statistics
    bdev_t part_bdev
    wait_t memory[CLAIMS]

cdef class LvolBdev(Bdev):
    cdef table_t* raw_table
    cdef ClusterTable current
    cdef readonly Space space
    cdef object describe
    cdef uint32_t writing   # operations that a read-only one lacks

cdef class LvolChannel(Channel):
    cdef volume_t volume
    cdef Channel base
    cdef Channel external
    cdef Fanout fanout
    cdef Turns turns
