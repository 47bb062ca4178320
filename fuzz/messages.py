"""Whole sessions of vhost-user messages against a real controller, in one thread.

A conversation is made of messages that are nearly right, of a guest that works on its rings
and of memory that is truncated meanwhile. What is checked after each: a session ends in no
other way than with a DrivebayError that is not our own fault; no descriptor, mapping, channel
or session is left behind; it ends within seconds; the neighbour's session is served.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import socket
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drivebay.bdev.malloc import MallocBdev
from drivebay.bdev.registry import BdevRegistry
from drivebay.errors import InternalError
from drivebay.memory.guest_memory import install_sigbus_handler, mapped_regions
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.blk_controller import BlkController
from drivebay.vhost.controllers import Controllers
from drivebay.vhost.session import Session
from drivebay.vhost.state import OFFERED_PROTOCOL_FEATURES
from fuzz.choices import Choices
from fuzz.speech import (
    AVAIL,
    DESC,
    DOOMED,
    INFLIGHT_AT,
    RING_SIZE,
    Message,
    Offer,
    Props,
    Speech,
    message,
)

__all__ = ["Messages"]

END_S = 20.0
MESSAGES = 80
TICK_NS = 10_000
COUNT_OBJECTS_EVERY = 200
FD_BYTES = array("i").itemsize


class AtOnce(ThreadPoolExecutor):
    """Worker threads that are none: the same input shall do the same each time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (it is the caller's, not lost)
            future.set_exception(error)
        return future


class Faults(logging.Handler):
    """What only a fault of ours would log or raise."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else ""
        self.found.append(f"{record.getMessage()} {cause!r}")

    def of_loop(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.found.append(repr(context))


class Messages:
    """The target for Explorer and for the coverage-guided engine."""

    name = "messages"

    def __init__(self) -> None:
        install_sigbus_handler()
        self.faults = Faults()
        logging.getLogger("drivebay").addHandler(self.faults)
        logging.getLogger("drivebay").propagate = False
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(AtOnce(1))
        self.loop.set_exception_handler(self.faults.of_loop)
        self.folder = tempfile.TemporaryDirectory()
        self.props = Props()
        self.seen: set[str] = set()
        self.executed = 0
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        self.control = ControlMailbox()
        self.reactor = Reactor(0, self.control)
        self._pump_task = asyncio.create_task(self._pump())
        registry = BdevRegistry()
        for name in ("Fuzzed", "Other"):
            registry.add(MallocBdev(name, None, 512, 256))
        self.controllers = Controllers(Path(self.folder.name), [self.reactor], registry)
        self.controller = await self.controllers.create_blk("fuzzed", "Fuzzed", packed_ring=True)
        listen_to(self.controller, self._heard)
        self.neighbour = await self._connect(await self.controllers.create_blk("other", "Other"))
        await self.expect_neighbour_served()

    async def _pump(self) -> None:
        """The reactor's turns, between those of the loop."""
        now = 1_000_000_000
        while True:
            now += TICK_NS
            self.reactor.step(now)
            self.control.drain()
            await asyncio.sleep(0)

    def _heard(self, sentence: str) -> None:
        if isinstance(sys.exc_info()[1], InternalError):
            self.faults.found.append(sentence)
        self.seen.add(re.sub(r"(0x[0-9a-f]+|\d+)(, \d+)*", "n", sentence))

    def run(self, data: bytes) -> frozenset[str]:
        return self.loop.run_until_complete(self._run(data))

    async def _run(self, data: bytes) -> frozenset[str]:
        self.seen = set()
        self.executed += 1
        mapped = mapped_regions()
        self.props.begin()
        fds = open_fds()
        await Conversation(self, Choices(data)).hold()
        expect_no_more("descriptors", open_fds(), fds)
        expect_no_more("mapped regions", mapped_regions(), mapped)
        self.props.end()
        if self.executed % COUNT_OBJECTS_EVERY == 0:
            gc.collect()
            expect_no_more("sessions", sum(isinstance(o, Session) for o in gc.get_objects()), 1)
        await self.expect_neighbour_served()
        if self.faults.found:
            raise AssertionError(f"a fault of ours: {self.faults.found}")
        return frozenset(self.seen)

    async def _connect(self, controller: BlkController) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await self.loop.sock_connect(sock, controller.socket_path)
        return sock

    async def connect(self) -> socket.socket:
        return await self._connect(self.controller)

    async def expect_neighbour_served(self) -> None:
        """GET_FEATURES, answered."""
        async with asyncio.timeout(END_S):
            await self.loop.sock_sendall(self.neighbour, message(1, b""))
            answer = await self.loop.sock_recv(self.neighbour, 64)
        request, flags, size, features = struct.unpack("=IIIQ", answer)
        if (request, flags, size) != (1, 5, 8) or not features >> 32 & 1:
            raise AssertionError(f"the neighbour was answered {answer!r}")

    def close(self) -> None:
        self.loop.run_until_complete(self._close())
        self.loop.close()
        self.reactor.close()
        self.props.close()
        self.folder.cleanup()

    async def _close(self) -> None:
        self.neighbour.close()
        await self.controllers.close()
        self._pump_task.cancel()
        await asyncio.wait([self._pump_task])


class Conversation:
    """One session from connect to its end."""

    def __init__(self, target: Messages, choices: Choices) -> None:
        self.target = target
        self.choices = choices
        self.props = target.props
        offer = Offer(target.controller.features(), int(OFFERED_PROTOCOL_FEATURES))
        self.speech = Speech(choices, target.props, offer)
        self.offered = 0

    async def hold(self) -> None:
        self.sock = await self.target.connect()
        with self.sock:
            said = 0
            for opening in self.speech.opening():
                await self._say(opening)
            while self.choices.left and said < MESSAGES:
                said += 1
                if not await self._one_thing():
                    break
            if not self.choices.rarely(4):  # otherwise it goes away in the middle of it
                self.sock.shutdown(socket.SHUT_WR)
                await self._until_end()
        await self._until_end()

    async def _until_end(self) -> None:
        async with asyncio.timeout(END_S):
            while self.target.controller.sessions:
                if self.sock.fileno() >= 0:
                    self._hear()
                await asyncio.sleep(0)

    async def _one_thing(self) -> bool:
        """False: the other side has had enough."""
        match self.choices.below(16):
            case 12:
                self._offer_requests()
                return True
            case 13:
                region = self.props.memory.regions[self.choices.below(2)]
                at = self.choices.number(2)
                value = self.choices.raw(8)
                region.bytes[at : at + 8] = value
                return True
            case 14:
                if self.choices.rarely(3):
                    os.ftruncate(self.props.shared, self.choices.pick((0, 100)))
                else:
                    os.ftruncate(self.props.doomed, 0)
                return True
            case 15:
                at = INFLIGHT_AT + self.choices.number(2) % self.choices.pick((64, 0x4000))
                os.pwrite(self.props.shared, self.choices.raw(8), at)
                return True
        return await self._say(self.speech.next())

    def _offer_requests(self) -> None:
        """Reads of the disk on ring 0, all right but for what the guest did to it before."""
        memory = self.props.memory.regions[0].bytes
        count = 1 + self.choices.below(4)
        data = self.choices.pick((0x9000, 0x9000, DOOMED))
        for slot in range(0, 3 * count, 3):
            chain = ((0x8000, 16, 1), (data, 512, 3), (0xA000, 1, 2))
            for n, (addr, length, flags) in enumerate(chain):
                struct.pack_into("<QIHH", memory, DESC + 16 * (slot + n), addr, length, flags,
                                 slot + n + 1)  # fmt: skip
            place = AVAIL + 4 + 2 * (self.offered % RING_SIZE)
            struct.pack_into("<H", memory, place, slot)
            self.offered += 1
        struct.pack_into("<H", memory, AVAIL + 2, self.offered & 0xFFFF)
        os.eventfd_write(self.props.eventfds[0], 1)

    async def _say(self, said: Message) -> bool:
        data, fds = said
        cut = self.choices.below(len(data) + 1) if self.choices.rarely(20) else len(data)
        try:
            sent = socket.send_fds(self.sock, [data[:cut]], fds) if cut else 0
            await self._turns(self.choices.pick((3, 3, 1, 0, 8)))
            self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            return False
        if cut == len(data):
            return True
        await self._turns(3)
        return True

    async def _turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)
        if count:
            self._hear()

    def _hear(self) -> None:
        """Read answers away, and the descriptors that came with them."""
        try:
            while True:
                data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(8 * FD_BYTES))
                for _level, _kind, raw in ancillary:
                    for fd in array("i", raw):
                        os.close(fd)
                if not data:
                    return
                self.target.seen.add(f"answer to {data[0]}, {len(data).bit_length()}")
        except (BlockingIOError, ConnectionResetError):
            return


def listen_to(controller: BlkController, heard: Callable[[str], None]) -> None:
    """Hear its complaints before a limit on log lines swallows them."""
    vars(controller).update(complain=heard, note=heard)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def expect_no_more(what: str, now: int, before: int) -> None:
    if now > before:
        raise AssertionError(f"{now - before} {what} were left behind")
