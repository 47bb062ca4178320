"""Serving a queue is C only: see blk_service.pxd; its Python door is BlkQueue."""
