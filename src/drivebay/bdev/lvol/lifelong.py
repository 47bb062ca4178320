"""Objects that stay: Python's collector need not walk through them again and again.

With 10,000 volumes one walk through everything is 0.1 s in which control does nothing else, and
while they are made there would be a dozen. Context: control.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["forgotten", "lifelong"]

_making = 0


@contextlib.contextmanager
def lifelong() -> Iterator[None]:
    """What is made meanwhile is never walked through, until forgotten().

    Nothing is collected meanwhile either, so no I/O may be waited for in it.
    """
    global _making
    _making += 1
    gc.disable()
    try:
        yield
    finally:
        _making -= 1
        if not _making:
            gc.freeze()
            gc.enable()


def forgotten() -> None:
    """Something that was to stay is gone: what is left of it may be collected."""
    gc.unfreeze()
