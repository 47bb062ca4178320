"""A WebSocket and a stream of bytes, joined: what comes from one goes to the other.

Context: an event loop. It reads a side only when the other has taken what was read before, so
that a slow one is waited for and nothing piles up; when one side ends, both are closed.

The frames' size is bounded by the server (`screen.serve`), the stream's pieces here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

__all__ = ["ENDED", "NOT_BYTES", "hang_up", "relay"]

PIECE_BYTES: Final = 65536

# RFC 6455, 7.4: codes from 4000 on are an application's own.
NOT_BYTES: Final = 1003
ENDED: Final = 4000  # the stream did


async def relay(
    websocket: WebSocket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Join them until one ends; ``websocket`` is accepted already. Closes both."""
    down = asyncio.create_task(_to_browser(websocket, reader))
    up = asyncio.create_task(_from_browser(websocket, writer))
    try:
        await asyncio.wait((down, up), return_when=asyncio.FIRST_COMPLETED)
        code = up.result() if up.done() else ENDED
    finally:
        for task in (down, up):
            task.cancel()
        await asyncio.gather(down, up, return_exceptions=True)
        writer.transport.abort()  # what a browser that left has typed last, nobody waits for
    if code is not None:
        await hang_up(websocket, code)


async def hang_up(websocket: WebSocket, code: int, reason: str = "") -> None:
    """Close it; one that has gone by itself is left alone."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await websocket.close(code, reason)


async def _to_browser(websocket: WebSocket, reader: asyncio.StreamReader) -> None:
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(OSError, RuntimeError, WebSocketDisconnect):
        while data := await reader.read(PIECE_BYTES):
            await websocket.send_bytes(data)


async def _from_browser(websocket: WebSocket, writer: asyncio.StreamWriter) -> int | None:
    """Returns: the code to close with; None when the browser has closed."""
    with contextlib.suppress(OSError):
        while True:
            message = await websocket.receive()
            if message["type"] != "websocket.receive":
                return None
            data = message.get("bytes")
            if data is None:
                return NOT_BYTES
            writer.write(data)
            await writer.drain()
    return ENDED
