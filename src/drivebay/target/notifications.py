"""What happened to bdevs lately, for clients that ask (notify_get_notifications).

Context: control. A ring of the last events; ids only grow.
"""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["EVENT_TYPES", "Notifications"]

EVENT_TYPES = ("bdev_register", "bdev_unregister", "bdev_resize")
KEPT = 1024


class Notifications:
    """The last ``KEPT`` events.

    >>> events = Notifications()
    >>> events.add("bdev_register", "Malloc0")
    >>> events.since(0, 10)
    [{'type': 'bdev_register', 'ctx': 'Malloc0', 'id': 0}]
    """

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._next_id = 0

    def add(self, kind: str, name: str) -> None:
        """Record one event."""
        self._events.append({"type": kind, "ctx": name, "id": self._next_id})
        self._next_id += 1

    def since(self, first_id: int, most: int) -> list[dict[str, Any]]:
        """Return at most ``most`` events, the oldest that is kept and not before first_id first."""
        chosen = [event for event in self._events if event["id"] >= first_id]
        return chosen[:most]
