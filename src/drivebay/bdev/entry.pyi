"""The one door to every bdev is C only: see entry.pxd."""
