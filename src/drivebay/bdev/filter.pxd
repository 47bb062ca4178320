"""What a filter has in common with its one base, which it stands for block by block."""

from drivebay.bdev.base cimport Bdev

cdef class FilterBdev(Bdev):
    pass
