"""Request parsing is C only: see blk_request.pxd; its Python door is BlkQueue."""
