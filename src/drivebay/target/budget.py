"""How much memory malloc bdevs may take together (``-s``). Context: control."""

from __future__ import annotations

import errno
import os

from drivebay.errors import HostError

__all__ = ["MemoryBudget"]

_MIB = 1024 * 1024


class MemoryBudget:
    """Bytes promised so far against a bound; without one, against the machine's memory.

    >>> budget = MemoryBudget(1)
    >>> budget.reserve(1024 * 1024)
    >>> budget.free
    0
    """

    def __init__(self, limit_mb: int = 0) -> None:
        """Bound it to limit_mb MiB; 0 for all the memory there is."""
        self._option = limit_mb
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._limit = limit_mb * _MIB if limit_mb else physical
        self._used = 0

    @property
    def free(self) -> int:
        """Bytes that may still be promised."""
        return self._limit - self._used

    def reserve(self, size: int) -> None:
        """Promise ``size`` bytes. Raises: HostError (ENOMEM) beyond the bound."""
        if size > self.free:
            bound = f"-s {self._option}" if self._option else "the memory of this machine"
            raise HostError(
                f"{size} bytes of memory are asked for, {self.free} of {self._limit} are left "
                f"within {bound}",
                errno.ENOMEM,
                hint="delete a malloc bdev or start the target with a larger -s",
            )
        self._used += size

    def release(self, size: int) -> None:
        """Take a promise back."""
        self._used -= size
