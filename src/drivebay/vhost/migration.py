"""Live migration of one session's guest: the dirty log, and whether anything is marked in it.

While a VM monitor copies a guest's memory to another machine, we go on writing into it.
Each page that we write is marked in a log that both sides map, so that it is copied again:

    SET_LOG_BASE          brings the log, or a larger one
    SET_FEATURES          VHOST_F_LOG_ALL: mark the data that requests write
    SET_VRING_ADDR        VHOST_VRING_F_LOG: mark the ring's own parts, too
    GET_VRING_BASE        stops a ring; all marks are there when it is answered

Nothing else is handed over: the new machine opens a session of its own.
Context: control, under the session's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.errors import PeerError
from drivebay.memory.guest_memory import Region
from drivebay.vhost.rings import Rings
from drivebay.wire.vhost_user import LogArea

__all__ = ["Migration"]


class Migration:
    """The dirty log of one session."""

    def __init__(self, rings: Rings, on_log_broken: Callable[[], None]) -> None:
        self._rings = rings
        self._on_log_broken = on_log_broken
        self._logging = False
        self._log: DirtyLog | None = None
        self._mapped: list[DirtyLog] = []  # the log, and former ones that a queue may still use

    @property
    def active(self) -> bool:
        """Whether what the guest's disk writes into memory is marked now."""
        return self._logging and self._log is not None

    async def take_log(self, area: LogArea, fd: int) -> None:
        """SET_LOG_BASE; done when the former log is used no more, and unmapped.

        Raises: PeerError, HostError.
        """
        new = await asyncio.to_thread(
            DirtyLog, fd, area.mmap_offset, area.size, self._on_log_broken
        )
        self._mapped.append(new)
        _require_room(new, self._rings.regions)
        self._log = new
        if self._logging:
            await self._rings.log_to(new)
        for former in self._mapped[:-1]:
            await self._release(former)

    async def set_logging(self, logging: bool) -> None:
        """VHOST_F_LOG_ALL in SET_FEATURES. The log itself stays for the next time."""
        self._logging = logging
        await self._rings.log_to(self._log if logging else None)

    def require_room_for(self, regions: Sequence[Region]) -> None:
        """Before running rings get other memory: unmarked writes would be lost. Raises: PeerError.

        Not for rings that stand still, because a front end that starts a device while it
        migrates brings the memory first and the log last.
        """
        if self._logging and self._log is not None:
            _require_room(self._log, regions)

    async def close(self) -> None:
        """After the rings have drained."""
        for log in list(self._mapped):
            await self._release(log)

    async def _release(self, log: DirtyLog) -> None:
        await asyncio.to_thread(log.release)
        self._mapped.remove(log)


def _require_room(log: DirtyLog, regions: Sequence[Region]) -> None:
    end = max((region.guest_addr + region.size for region in regions), default=0)
    if end > log.covers:
        raise PeerError(
            f"the dirty log has room for guest memory up to {log.covers:#x}, "
            f"but there is some up to {end:#x}"
        )
