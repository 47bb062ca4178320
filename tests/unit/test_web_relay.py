"""web/relay.py between a WebSocket that a test plays and a real pair of sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from drivebay.web.relay import ENDED, NOT_BYTES, PIECE_BYTES, relay

LARGE = 16 << 20


class Browser:
    """What the relay sees of one; ``room`` is clear while it takes nothing."""

    def __init__(self) -> None:
        self.typed: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.shown: list[bytes] = []
        self.code: int | None = None
        self.room = asyncio.Event()
        self.room.set()
        self.gone = False

    async def receive(self) -> dict[str, Any]:
        return await self.typed.get()

    async def send_bytes(self, data: bytes) -> None:
        await self.room.wait()
        if self.gone:
            raise WebSocketDisconnect(1006)
        self.shown.append(data)

    async def close(self, code: int, reason: str = "") -> None:
        if self.gone:
            raise RuntimeError("closed already")
        self.code = code

    def type(self, **message: object) -> None:
        self.typed.put_nowait({"type": "websocket.receive", **message})

    def leave(self) -> None:
        self.gone = True
        self.typed.put_nowait({"type": "websocket.disconnect", "code": 1001})


Play = Callable[[Browser, socket.socket, "asyncio.Task[None]"], Awaitable[None]]


def joined(play: Play) -> Browser:
    """Run a scene: the browser, QEMU's end of the stream, the relay."""

    async def scene() -> Browser:
        browser = Browser()
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            task = asyncio.create_task(relay(browser, reader, writer))  # type: ignore[arg-type]
            await play(browser, theirs, task)
            await asyncio.wait_for(task, 20)
            with pytest.raises(BrokenPipeError):  # the stream is closed, too
                theirs.send(b"x")
        return browser

    return asyncio.run(scene())


async def settled() -> None:
    """Let the relay do all that it can."""
    for _ in range(200):
        await asyncio.sleep(0)


def test_bytes_go_both_ways_unchanged() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        everything = bytes(range(256))
        browser.type(bytes=everything)
        browser.type(bytes=b"", text=None)
        browser.type(bytes=b"more")
        assert await loop.sock_recv(qemu, 256) == everything
        assert await loop.sock_recv(qemu, 256) == b"more"
        await loop.sock_sendall(qemu, everything)
        await settled()
        assert b"".join(browser.shown) == everything
        browser.leave()

    assert joined(play).code is None


def test_a_text_ends_it() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        browser.type(text="RFB 003.008\n")

    assert joined(play).code == NOT_BYTES


def test_the_end_of_the_stream_is_told_after_its_last_bytes() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        await asyncio.get_running_loop().sock_sendall(qemu, b"last")
        qemu.shutdown(socket.SHUT_RDWR)

    browser = joined(play)
    assert (browser.shown, browser.code) == ([b"last"], ENDED)


def test_nothing_is_read_for_a_browser_that_takes_nothing() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        browser.room.clear()
        sent = 0
        for _ in range(LARGE // PIECE_BYTES):
            await settled()
            try:
                sent += qemu.send(bytes(PIECE_BYTES))
            except BlockingIOError:
                break
        assert 0 < sent < LARGE
        browser.room.set()
        while len(b"".join(browser.shown)) < sent:
            await asyncio.sleep(0.001)
        assert max(map(len, browser.shown)) <= PIECE_BYTES
        browser.leave()

    joined(play)


def test_nothing_is_taken_for_a_qemu_that_reads_nothing() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        for _ in range(LARGE // PIECE_BYTES):
            browser.type(bytes=bytes(PIECE_BYTES))
        await settled()
        left = browser.typed.qsize()
        assert left > LARGE // PIECE_BYTES // 2
        browser.type(text="the end")
        loop = asyncio.get_running_loop()
        while not task.done():
            try:
                await asyncio.wait_for(loop.sock_recv(qemu, PIECE_BYTES), 0.1)
            except (TimeoutError, OSError):
                break

    assert joined(play).code == NOT_BYTES


def test_a_browser_that_vanishes_while_it_is_sent_to_ends_it() -> None:
    async def play(browser: Browser, qemu: socket.socket, task: asyncio.Task[None]) -> None:
        browser.gone = True
        await asyncio.get_running_loop().sock_sendall(qemu, b"x")

    assert joined(play).code is None
