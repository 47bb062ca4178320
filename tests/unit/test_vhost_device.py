"""The configuration space, the cache mode, and the channel that tells of changes.

Against a real session on a real socket over a stand-in data plane.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.descriptors import more_fds_than, open_fds
from tests.fakes.front_end import HEADER, VERSION, FrontEnd, Refused, Request
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import (
    ALL_PROTOCOL,
    BIT_30,
    CONFIG_WCE,
    FLUSH,
    VERSION_1,
    Serving,
    negotiate,
    start_ring,
)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    before = open_fds()
    with Serving(tmp_path, monkeypatch) as running:
        running.create()
        yield running
    assert not more_fds_than(before)


@pytest.fixture
def bystander(serving: Serving) -> Iterator[FrontEnd]:
    """Another front end, which must be served after whatever the first one did."""
    with serving.connect() as front:
        negotiate(front)
        yield front
        assert front.get_queue_num() == 256


# The configuration space and the cache mode ----------------------------------------------


def test_get_config_works_before_any_feature_of_the_device(serving: Serving) -> None:
    with serving.connect() as front:
        front.set_protocol_features(ALL_PROTOCOL)
        space = front.get_config(0, 256)
        assert len(space) == 256
        assert struct.unpack_from("<Q", space) == (2048,)
        assert space[96:] == bytes(160)
        assert front.get_config(34, 2) == struct.pack("<H", 256)
        assert front.get_config(20, 8) == space[20:28]
        assert front.get_config(255, 1) == b"\0"


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (1, 256), (256, 1), (0xFFFFFFFF, 8)])
def test_get_config_that_fails_is_answered_with_nothing(
    serving: Serving, offset: int, size: int
) -> None:
    """ "Uses zero length of payload to indicate an error"; the session goes on."""
    with serving.connect() as front:
        negotiate(front)
        reply = front.ask(
            Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(min(size, 256))
        )
        assert reply.payload == b""
        assert front.get_queue_num() == 256


def test_get_config_may_ask_without_sending_room(serving: Serving) -> None:
    with serving.connect() as front:
        negotiate(front)
        reply = front.ask(Request.GET_CONFIG, struct.pack("=III", 20, 4, 0))
        assert reply.payload == struct.pack("=IIII", 20, 4, 0, 512)


@pytest.mark.parametrize(
    ("features", "told", "write_through"),
    [
        (0, 0, True),
        (CONFIG_WCE, 0, True),
        (FLUSH, 1, False),
        (FLUSH | CONFIG_WCE, 1, False),
    ],
)
def test_virtio13_5_2_5_2_cache_mode_follows_what_was_negotiated(
    serving: Serving, features: int, told: int, write_through: bool
) -> None:
    """ "If VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not, the device MUST
    initialize writeback to 0." """
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front, features)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        assert front.get_config(32, 1) == bytes([told])
        assert serving.plane.queues[0].terms["write_through"] is write_through
        for fd in fds:
            os.close(fd)


def test_set_config_switches_the_cache_mode_of_this_session_only(serving: Serving) -> None:
    with serving.connect() as front, serving.connect() as other, GuestMemory() as memory:
        for end in (front, other):
            negotiate(end, FLUSH | CONFIG_WCE)
            end.set_mem_table(memory)
        fds = start_ring(front, memory) + start_ring(other, memory)
        front.set_config(32, b"\0")
        assert [queue.write_through for queue in serving.plane.queues] == [True, False]
        assert front.get_config(32, 1) == b"\0"
        assert other.get_config(32, 1) == b"\1"
        front.set_config(32, b"\1")
        assert serving.plane.queues[0].write_through is False
        for fd in fds:
            os.close(fd)


def test_the_cache_mode_outlives_a_reset(serving: Serving) -> None:
    """The front end answers the guest from its own copy and does not set it again."""
    with serving.connect() as front:
        negotiate(front, FLUSH | CONFIG_WCE)
        front.set_config(32, b"\0")
        front.reset_device()
        front.set_features(VERSION_1 | BIT_30 | FLUSH | CONFIG_WCE)
        assert front.get_config(32, 1) == b"\0"


@pytest.mark.parametrize(
    ("features", "offset", "data"),
    [
        (FLUSH | CONFIG_WCE, 0, bytes(8)),  # capacity
        (FLUSH | CONFIG_WCE, 32, bytes(2)),
        (FLUSH | CONFIG_WCE, 31, bytes(2)),
        (FLUSH | CONFIG_WCE, 32, b"\2"),
        (FLUSH, 32, b"\0"),
    ],
)
def test_set_config_of_anything_else_is_refused_but_does_no_harm(
    serving: Serving, features: int, offset: int, data: bytes
) -> None:
    """ "Back-ends MUST NOT accept SET_CONFIG for read-only configuration space fields." """
    with serving.connect() as front:
        negotiate(front, features)
        before = front.get_config(0, 96)
        with pytest.raises(Refused):
            front.set_config(offset, data)
        assert front.get_config(0, 96) == before


def test_set_config_of_a_migration_writes_the_whole_space(serving: Serving) -> None:
    """ "Unless the live migration bit is set": only the cache mode is the front end's."""
    with serving.connect() as front:
        negotiate(front, FLUSH | CONFIG_WCE)
        before = front.get_config(0, 60)
        front.set_config(0, bytes(60), flags=1)
        assert front.get_config(0, 60) == before[:32] + b"\0" + before[33:]


# The channel back ------------------------------------------------------------------------


def test_a_resize_is_told_on_the_channel_back(serving: Serving) -> None:
    bdev = serving.registry.get("Fake0")
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        with front.set_backend_req_fd() as channel:
            fds = start_ring(front, memory)
            bdev.num_blocks = 4096
            (listener,) = serving.registry.listeners
            serving.run(listener(bdev, "resize"))
            assert channel.recv(100) == HEADER.pack(2, VERSION, 0)
            assert front.get_config(0, 8) == struct.pack("<Q", 4096)
            for fd in fds:
                os.close(fd)


def test_no_message_while_all_rings_are_stopped(serving: Serving) -> None:
    """It is owed until one starts."""
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        with front.set_backend_req_fd() as channel:
            fds = start_ring(front, memory)
            front.get_vring_base(0)
            (listener,) = serving.registry.listeners
            serving.run(listener(serving.registry.get("Fake0"), "resize"))
            channel.setblocking(False)
            with pytest.raises(BlockingIOError):
                channel.recv(1)
            channel.settimeout(20)
            front.set_vring_kick(0, fds[0])
            assert channel.recv(100) == HEADER.pack(2, VERSION, 0)
            for fd in fds:
                os.close(fd)


def test_a_channel_that_nobody_reads_holds_up_nothing(
    serving: Serving, bystander: FrontEnd
) -> None:
    bdev = serving.registry.get("Fake0")
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        with front.set_backend_req_fd() as channel:
            fds = start_ring(front, memory)
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            (listener,) = serving.registry.listeners
            for _ in range(2000):
                serving.run(listener(bdev, "resize"))
            assert front.get_queue_num() == 256
            for fd in fds:
                os.close(fd)


def test_a_channel_that_is_closed_holds_up_nothing(serving: Serving) -> None:
    bdev = serving.registry.get("Fake0")
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        front.set_backend_req_fd().close()
        fds = start_ring(front, memory)
        (listener,) = serving.registry.listeners
        for _ in range(3):
            serving.run(listener(bdev, "resize"))
        assert front.get_queue_num() == 256
        for fd in fds:
            os.close(fd)
