"""The Python door of one virtqueue of a virtio-blk device. Context: control."""

from libc.stdint cimport uint32_t, uint64_t

from drivebay.bdev.base cimport Channel
from drivebay.dataplane.blk_service cimport blk_queue_t
from drivebay.dataplane.dirty_log cimport DirtyLog
from drivebay.dataplane.inflight cimport InflightQueue
from drivebay.memory.guest_memory cimport MemoryTable
from drivebay.reactor.mailbox cimport Answer, EventOwner, act_fn

cdef class BlkQueue(EventOwner):
    cdef blk_queue_t raw
    cdef readonly int index
    cdef Channel channel
    cdef MemoryTable table
    cdef InflightQueue inflight    # None: nothing is kept
    cdef DirtyLog log               # None: nobody migrates
    cdef tuple rings            # user addresses of its three areas
    cdef object on_broken
    cdef void* memory
    cdef size_t memory_bytes
    cdef uint32_t delay_base_us
    cdef uint32_t iops_threshold
    cdef bint started
    cdef bint stopped
    cdef Answer ask(
        self, act_fn act, object keep, uint64_t a=*, uint64_t b=*, uint64_t c=*, uint64_t d=*
    )
    cdef tuple resolve_rings(self, MemoryTable table)
    cdef int bind(self, MemoryTable table) except -1
    cdef int recover(self, InflightQueue inflight) except -1
    cdef int set_base(self, uint32_t base) except -1
    cdef int allocate(self, int size) except -1
    cdef bint live(self) noexcept
