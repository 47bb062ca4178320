"""A part's I/O goes through to its base, the start of the part further."""

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.bdev.entry cimport submit_through

from drivebay.errors import UsageError


cdef class PartChannel(Channel):
    def __init__(self, PartBdev bdev, reactor, Channel base):
        Channel.__init__(self, bdev, reactor)
        self.raw.submit = submit_through
        self.raw.through = &base.raw
        self.raw.shift = bdev.offset_blocks * bdev.block_size


cdef class PartBdev(Bdev):
    def __init__(self, str name, uuid, Bdev base, offset_blocks, num_blocks):
        Bdev.__init__(self, name, uuid, base.block_size, num_blocks)
        if offset_blocks < 0 or offset_blocks + num_blocks > base.num_blocks:
            raise UsageError(
                f"bdev '{base.name}' has {base.num_blocks} blocks, not the {num_blocks} blocks "
                f"from block {offset_blocks} on that bdev '{name}' would be")
        self.offset_blocks = offset_blocks
        self.own_blocks = num_blocks
        self.stand_through(base)
        self.readonly = base.readonly
        self.raw.operations = base.raw.operations

    @property
    def content_id(self):
        return f"{self.bases[0].content_id} from block {self.offset_blocks}"

    def size_on_bases(self):
        """A part keeps its place: it is cut off where its base ends, and grows back with it."""
        return min(self.own_blocks, self.bases[0].num_blocks - self.offset_blocks)

    def open_channel(self, reactor, *bases):
        return PartChannel(self, reactor, bases[0])
