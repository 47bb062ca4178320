"""How many descriptors this process holds, and whether something leaked any.

Context: tests. Garbage of earlier tests holds descriptors too, and may go at any moment.
"""

from __future__ import annotations

import gc
import os


def held_fds() -> int:
    """How many descriptors this process holds once garbage is gone: two counts compare exactly."""
    gc.collect()
    return open_fds()


def open_fds() -> int:
    """How many descriptors this process holds, those of garbage among them: quick."""
    return len(os.listdir("/proc/self/fd"))


def more_fds_than(before: int) -> int:
    """How many descriptors have leaked; those that only garbage holds have not."""
    if open_fds() <= before:
        return 0
    return max(0, held_fds() - before)
