"""How many descriptors this process holds, and whether something leaked any.

Context: tests. Garbage of earlier tests holds descriptors too, and may go at any moment:
a count is only ever compared through ``more_fds_than``.
"""

from __future__ import annotations

import gc
import os


def open_fds() -> int:
    """How many descriptors this process holds, those of garbage among them."""
    return len(os.listdir("/proc/self/fd"))


def more_fds_than(before: int) -> int:
    """How many descriptors have leaked; those that only garbage holds have not."""
    if open_fds() > before:
        gc.collect()
    return max(0, open_fds() - before)
