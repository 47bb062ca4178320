"""The split virtqueue is C only: see split_virtqueue.pxd; its Python door is BlkQueue."""
