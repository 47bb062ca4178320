"""Thousands of things, one after the other, while the loop's other work has its turns.

Context: control (the asyncio thread).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

__all__ = ["in_slices"]

_Item = TypeVar("_Item")


async def in_slices(items: Iterable[_Item], most: int) -> AsyncIterator[_Item]:
    """Yield the items; after ``most`` of them others have a turn, and after as many again.

    What is yielded may be gone by then: whoever cares looks.
    """
    for count, item in enumerate(items):
        if count and count % most == 0:
            await asyncio.sleep(0)
        yield item
