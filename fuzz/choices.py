"""A string of bytes read as decisions, so that a fuzzer which changes bytes changes decisions.

Every decision takes the same number of bytes wherever it stands, and when the bytes are used
up the first alternative is taken: a shortened input means the same as before up to where it
ends, then behaves well. Alternatives are therefore listed with the usual one in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Choices"]

T = TypeVar("T")


class Choices:
    """Decisions out of ``data``, in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not used yet."""
        return len(self._data) - self._at

    def raw(self, count: int) -> bytes:
        """The next bytes themselves; zeroes behind the end."""
        taken = self._data[self._at : self._at + count]
        self._at = min(self._at + count, len(self._data))
        return taken.ljust(count, b"\0")

    def number(self, width: int) -> int:
        """Any number of so many bytes."""
        return int.from_bytes(self.raw(width), "little")

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        width = 1 if limit <= 1 << 8 else 2 if limit <= 1 << 16 else 8
        return self.number(width) % limit

    def pick(self, alternatives: Sequence[T]) -> T:
        return alternatives[self.below(len(alternatives))]

    def rarely(self, one_in: int) -> bool:
        """True once in so many times, and never behind the end."""
        return self.below(one_in) == one_in - 1
