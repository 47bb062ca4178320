"""Who has taken a bdev for itself, and how much of it. Context: control; no I/O."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

from drivebay.errors import InUse

__all__ = ["EXCLUSIVE", "ONE_WRITER", "READERS", "Claims"]

# SPDK's words, as bdev_get_bdevs shows them.
EXCLUSIVE: Final = "exclusive_write"  # its only user
ONE_WRITER: Final = "read_many_write_one"  # its only writer
READERS: Final = "read_many_write_none"  # any number of readers, nobody writes


@dataclass
class _Claim:
    kind: str
    holders: list[str] = field(default_factory=list)


class Claims:
    """The claims on one bdev.

    >>> claims = Claims()
    >>> claims.take("M0", "lvol store 'a'", READERS)
    >>> claims.take("M0", "lvol store 'b'", READERS)
    >>> claims.holder
    "lvol store 'a'"
    """

    __slots__ = ("_claim",)

    def __init__(self) -> None:
        self._claim: _Claim | None = None

    @property
    def kind(self) -> str | None:
        """EXCLUSIVE, ONE_WRITER or READERS; None when nobody holds it."""
        return self._claim.kind if self._claim is not None else None

    @property
    def holder(self) -> str | None:
        """The first of those who hold it."""
        return self._claim.holders[0] if self._claim is not None else None

    def take(self, name: str, by: str, kind: str) -> None:
        """Add a claim on bdev ``name``. Raises: InUse with errno EPERM, SPDK's answer."""
        if self._claim is None:
            self._claim = _Claim(kind, [by])
        elif kind == READERS == self._claim.kind:
            self._claim.holders.append(by)
        else:
            raise refusal(name, f"is claimed by {self.holder}")

    def release(self, by: str) -> None:
        """Give one back; harmless when there is none."""
        if self._claim is not None and by in self._claim.holders:
            self._claim.holders.remove(by)
            if not self._claim.holders:
                self._claim = None


def refusal(name: str, why: str) -> InUse:
    """SPDK answers EPERM, not EBUSY, about a bdev that somebody has."""
    error = InUse(f"bdev '{name}' {why}")
    error.errno = errno.EPERM
    return error
