"""The passthru bdev hands every I/O to its base: for trying what a layer costs, and the
pattern of every other filter.
"""

from drivebay.bdev.base cimport Bdev, Channel
from drivebay.bdev.entry cimport submit_through
from drivebay.bdev.filter cimport FilterBdev


cdef class PassthruChannel(Channel):
    def __init__(self, Bdev bdev, reactor, Channel base):
        Channel.__init__(self, bdev, reactor)
        self.raw.submit = submit_through
        self.raw.through = &base.raw     # open for longer than this one


cdef class PassthruBdev(FilterBdev):
    product_name = "passthru"
    module = "passthru"

    def __init__(self, str name, uuid, Bdev base):
        FilterBdev.__init__(self, name, uuid, base)
        self.stand_through(base)

    def open_channel(self, reactor, *bases):
        return PassthruChannel(self, reactor, bases[0])

    def driver_specific(self):
        return {"passthru": {"name": self.name, "base_bdev_name": self.bases[0].name}}
