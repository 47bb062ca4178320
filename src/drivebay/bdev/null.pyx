"""The null bdev, for measuring everything but the disk. Reads leave the guest's
buffer as it is; writes vanish.
"""

from drivebay.bdev.base cimport (
    Bdev, Channel, IO_READ, IO_WRITE, IO_WRITE_ZEROES, SUBMIT_DONE, channel_t, io_t,
)


cdef int null_submit(channel_t* channel, io_t* io) noexcept nogil:
    io.status = 0
    return SUBMIT_DONE


cdef class NullChannel(Channel):
    def __init__(self, Bdev bdev, reactor):
        Channel.__init__(self, bdev, reactor)
        self.raw.submit = null_submit


cdef class NullBdev(Bdev):
    product_name = "Null disk"
    module = "null"

    def __init__(self, str name, uuid, int block_size, num_blocks):
        Bdev.__init__(self, name, uuid, block_size, num_blocks)
        self.raw.operations = 1 << IO_READ | 1 << IO_WRITE | 1 << IO_WRITE_ZEROES

    @property
    def content_id(self):
        return "null"       # no content, so never another one

    def open_channel(self, reactor, *bases):
        return NullChannel(self, reactor)

    def save(self):
        return "bdev_null_create", {
            "name": self.name, "num_blocks": self.num_blocks, "block_size": self.block_size,
            "uuid": str(self.uuid)}
