"""Reads and writes of control itself: metadata, examining, copying from disk to disk.

Each is one message to the channel's reactor, whose answer comes when the I/O is complete.
Context: control, except the act_* function and the frame.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.stdlib cimport posix_memalign

from drivebay.bdev.base cimport (
    FRAME_TAKEN, IO_FLUSH, IO_FUA, IO_MAY_UNMAP, IO_READ, IO_UNMAP, IO_WRITE, IO_WRITE_ZEROES,
    SUBMIT_DONE, Channel, channel_t, io_push, io_t,
)
from drivebay.bdev.entry cimport bdev_submit
from drivebay.reactor.mailbox cimport message_answer, message_t

from drivebay.errors import HostError

cdef enum:
    ALIGNMENT = 4096


cdef int transferred(io_t* io, void* context, uint64_t saved, uint64_t stamp) noexcept nogil:
    message_answer(<message_t*>context, io.status)
    return FRAME_TAKEN      # control may have freed it already


cdef void act_transfer(message_t* message, void* reactor) noexcept nogil:
    cdef io_t* io = <io_t*>message.target
    io_push(io, transferred, message, 0)
    if bdev_submit(<channel_t*>io.channel, io) == SUBMIT_DONE:
        message_answer(message, io.status)


cdef class Transfer:
    """One I/O and its aligned buffer; it lives until the reactor has answered."""

    def __cinit__(self, Channel channel, int operation, int flags, uint64_t offset,
                  uint64_t length, bint buffered):
        self.io.channel = &channel.raw
        self.io.operation = operation
        self.io.flags = flags
        self.io.offset = offset
        self.io.length = length
        if buffered and length:
            if posix_memalign(<void**>&self.buffer, ALIGNMENT, length) != 0:
                self.buffer = NULL
                raise MemoryError(f"no memory for {length} bytes of bdev '{channel.bdev.name}'")
            self.part.iov_base = self.buffer
            self.part.iov_len = length
            self.io.iov = &self.part
            self.io.iov_count = 1

    def __dealloc__(self):
        free(self.buffer)


cdef class Access:
    cdef readonly Channel channel

    def __init__(self, Channel channel):
        self.channel = channel

    async def carry(self, Transfer transfer, what):
        cdef Channel channel = self.channel
        status = await channel.reactor.ask(act_transfer, &transfer.io, (transfer, channel))
        if status < 0:
            raise HostError(f"bdev '{channel.bdev.name}' failed to {what} at byte "
                            f"{transfer.io.offset}", -status)

    async def read(self, uint64_t offset, uint64_t length):
        cdef Transfer transfer = Transfer(self.channel, IO_READ, 0, offset, length, True)
        await self.carry(transfer, f"read {length} bytes")
        return transfer.buffer[:length] if length else b""

    async def write(self, uint64_t offset, data, *, bint fua=False):
        cdef const unsigned char[::1] source = data
        cdef uint64_t length = source.shape[0]
        cdef Transfer transfer = Transfer(
            self.channel, IO_WRITE, IO_FUA if fua else 0, offset, length, True)
        if length:
            memcpy(transfer.buffer, &source[0], length)
        await self.carry(transfer, f"write {length} bytes")

    async def flush(self):
        if "flush" in self.channel.bdev.io_types:
            await self.carry(Transfer(self.channel, IO_FLUSH, 0, 0, 0, False), "flush")

    async def unmap(self, uint64_t offset, uint64_t length):
        await self.carry(Transfer(self.channel, IO_UNMAP, 0, offset, length, False),
                         f"unmap {length} bytes")

    async def write_zeroes(self, uint64_t offset, uint64_t length, *, bint may_unmap=False):
        await self.carry(
            Transfer(self.channel, IO_WRITE_ZEROES, IO_MAY_UNMAP if may_unmap else 0, offset,
                     length, False),
            f"clear {length} bytes")
