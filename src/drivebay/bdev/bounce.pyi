"""Bounce buffers are C only: see bounce.pxd."""
