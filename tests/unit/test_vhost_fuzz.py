"""Whatever a front end says, in whatever order: it is answered or ended, and never a fault of ours.

Random conversations made of nearly right messages, against a real session on a
real socket over a stand-in data plane, with another session beside it.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.descriptors import more_fds_than, open_fds
from tests.fakes.front_end import HEADER, FrontEnd, HungUp, Request
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import (
    ALL_PROTOCOL,
    BIT_30,
    LOG_ALL,
    VERSION_1,
    Serving,
    negotiate,
)

CONVERSATIONS = 40
MESSAGES = 60

EDGES = (0, 1, 2, 7, 8, 63, 64, 255, 256, 1023, 1024, 1025, 0xFFFF, 0x10000, 1 << 31)
EDGES_64 = (*EDGES, (1 << 32) - 1, 1 << 32, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


class Speaker:
    """Makes messages that are often right, so that they get behind the first check."""

    def __init__(self, seed: int, memory: GuestMemory) -> None:
        self.random = random.Random(seed)
        self.memory = memory
        self.eventfd = os.eventfd(0)
        self.pipe = os.pipe()

    def close(self) -> None:
        for fd in (self.eventfd, *self.pipe):
            os.close(fd)

    def message(self) -> tuple[bytes, list[int]]:
        request = self.random.choice((*Request, 0, 19, 99)) if self.chance(10) else self.likely()
        payload, fds = self.payload(request)
        if self.chance(60):
            payload = payload[: self.random.randrange(len(payload) + 1)]
        if self.chance(40):
            fds = [self.random.choice((self.eventfd, self.pipe[0], self.memory.regions[0].fd))]
            fds *= self.random.randrange(10)
        flags = 1 | (8 if self.chance(2) else 0) | (4 if self.chance(200) else 0)
        size = self.random.choice((*EDGES, 0xFFFFFFFF)) if self.chance(60) else len(payload)
        return HEADER.pack(request, flags, size) + payload, fds

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    def likely(self) -> int:
        return self.random.choice(
            (
                Request.SET_VRING_NUM,
                Request.SET_VRING_ADDR,
                Request.SET_VRING_BASE,
                Request.SET_VRING_KICK,
                Request.SET_VRING_CALL,
                Request.SET_VRING_ENABLE,
                Request.GET_VRING_BASE,
                Request.SET_MEM_TABLE,
                Request.ADD_MEM_REG,
                Request.REM_MEM_REG,
                Request.SET_FEATURES,
                Request.SET_STATUS,
                Request.SET_CONFIG,
                Request.SET_LOG_BASE,
            )
        )

    def payload(self, request: int) -> tuple[bytes, list[int]]:
        number, edge = self.random.randrange(3), self.random.choice
        match request:
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                return struct.pack("=Q", number), [self.eventfd]
            case Request.SET_VRING_NUM:
                return struct.pack("=II", number, 64 if not self.chance(8) else edge(EDGES)), []
            case Request.SET_VRING_ADDR:
                base = self.memory.regions[0].user_addr + number * 0x4000
                where = [base, base + 0x2000, base + 0x1000]
                if self.chance(8):
                    where[number] = edge(EDGES_64)
                return struct.pack("=IIQQQQ", number, edge((0, 0, 1, 3)), *where, 0), []
            case Request.SET_LOG_BASE:
                area = [self.memory.regions[0].size, 0]
                if self.chance(8):
                    area[number % 2] = edge(EDGES_64)
                return struct.pack("=QQ", *area), [self.memory.regions[0].fd]
            case Request.SET_MEM_TABLE:
                count = edge((0, 1, 2, 2, 2, 2, 3))
                regions = [self.region(i % 2) for i in range(count)]
                fds = [self.memory.regions[i % 2].fd for i in range(count)]
                return struct.pack("=II", count, 0) + b"".join(regions), fds
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                which = number % 2
                return bytes(8) + self.region(which), [self.memory.regions[which].fd]
            case Request.SET_FEATURES:
                likely = VERSION_1 | BIT_30 | edge((0, LOG_ALL))
                return struct.pack("=Q", likely if not self.chance(8) else 0), []
            case Request.GET_CONFIG | Request.SET_CONFIG:
                if self.chance(8):
                    return struct.pack("=III", edge(EDGES), edge(EDGES), 0) + bytes(8), []
                return struct.pack("=III", 32, 1, 0) + bytes([number % 2]), []
            case Request.SET_STATUS | Request.SET_PROTOCOL_FEATURES:
                likely = ALL_PROTOCOL if request == Request.SET_PROTOCOL_FEATURES else edge((0, 15))
                return struct.pack("=Q", likely if not self.chance(8) else edge(EDGES_64)), []
            case Request.SET_VRING_BASE | Request.GET_VRING_BASE | Request.SET_VRING_ENABLE:
                value = edge((0, 1)) if not self.chance(8) else edge(EDGES)
                return struct.pack("=II", number, value), []
            case _:
                return (b"" if not self.chance(8) else bytes(8)), []

    def region(self, which: int) -> bytes:
        region = self.memory.regions[which]
        fields = [region.guest_addr, region.size, region.user_addr, region.mmap_offset]
        if self.chance(10):
            fields[self.random.randrange(4)] = self.random.choice(EDGES_64)
        return struct.pack("=4Q", *fields)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    before = open_fds()
    with Serving(tmp_path, monkeypatch) as running:
        running.create()
        yield running
    assert not more_fds_than(before)


@pytest.mark.parametrize("seed", range(4))
def test_random_conversations(
    serving: Serving, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    from drivebay.memory.guest_memory import mapped_regions

    mapped = mapped_regions()
    with GuestMemory() as memory, serving.connect() as bystander:
        negotiate(bystander)
        speaker = Speaker(seed, memory)
        try:
            for _ in range(CONVERSATIONS):
                converse(serving.connect, speaker)
        finally:
            speaker.close()
        assert bystander.get_queue_num() == 256
    serving.until_empty()
    assert len(serving.plane.queues) >= CONVERSATIONS, "the conversations never got far"
    assert serving.registry.channels == []
    assert mapped_regions() == mapped
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def converse(connect: Callable[[], FrontEnd], speaker: Speaker) -> None:
    """Talk until the other side has had enough, or we have; read every answer away."""
    with connect() as front:
        front.set_protocol_features(ALL_PROTOCOL)
        front.set_features(VERSION_1 | BIT_30)
        front.set_mem_table(speaker.memory)
        base = speaker.memory.regions[0].user_addr
        front.set_vring_num(0, 64)
        front.set_vring_addr(0, base, base + 0x1000, base + 0x2000)
        front.set_vring_kick(0, speaker.eventfd)
        front.set_vring_enable(0)
        for _ in range(MESSAGES):
            data, fds = speaker.message()
            try:
                front.send_raw(data, fds[:250])
                front.socket.setblocking(False)
                front.socket.recv(1 << 16)
            except BlockingIOError:
                pass
            except (HungUp, ConnectionResetError):
                return
            finally:
                front.socket.settimeout(20)
        front.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while front.socket.recv(1 << 16):
                pass
