from typing import Any

from drivebay.bdev.base import Channel

class Access:
    """Reads and writes through one open channel, from control. See registry.access()."""

    channel: Channel

    def __init__(self, channel: Channel) -> None: ...
    async def read(self, offset: int, length: int) -> bytes:
        """Both in bytes, multiples of the block size. Raises: HostError."""

    async def write(self, offset: int, data: Any, *, fua: bool = False) -> None:
        """``data`` is bytes-like, a multiple of the block size. Raises: HostError."""

    async def flush(self) -> None:
        """What was written is stable; nothing to do where it always is. Raises: HostError."""

    async def unmap(self, offset: int, length: int) -> None:
        """Raises: HostError."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Raises: HostError."""
