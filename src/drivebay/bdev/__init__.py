"""THE PATH: block devices, the one entry to them, and their registry."""
