"""What rings share is C only: see ring.pxd; its Python door is BlkQueue."""
