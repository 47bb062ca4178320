"""The split virtqueue is C only: see virtqueue.pxd; its Python door is BlkQueue."""
