"""The packed virtqueue is C only: see packed_virtqueue.pxd; its Python door is BlkQueue."""
