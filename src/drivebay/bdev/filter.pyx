"""A bdev that shows what its base has: passthru, delay and error are such. Context: control."""

from drivebay.bdev.base cimport Bdev


cdef class FilterBdev(Bdev):
    def __init__(self, str name, uuid, Bdev base):
        Bdev.__init__(self, name, uuid, base.block_size, base.num_blocks)
        self.readonly = base.readonly
        self.raw.operations = base.raw.operations

    @property
    def content_id(self):
        return self.bases[0].content_id

    def size_on_bases(self):
        return self.bases[0].num_blocks
