"""The front end's end of a vhost-user socket, against targets that are none."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import DiskConfig, VhostUserBlk
from drivebay.engines.vhost_user_connection import CannotConnect, Connection, TargetGone
from drivebay.errors import PeerError, UsageError
from drivebay.wire.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    ProtocolFeature,
    Request,
)
from drivebay.wire.virtio_blk import BlkConfig, BlkFeature, feature_mask

VERSION, REPLY, NEED_REPLY = 1, 4, 8
HEADER = struct.Struct("=III")
Target = Callable[[socket.socket], None]


@contextmanager
def served(path: Path, target: Target) -> Iterator[str]:
    """A socket at which ``target`` is called with the first connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                target(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            thread.join(30)


def receive(peer: socket.socket) -> tuple[int, int, bytes]:
    request, flags, size = HEADER.unpack(peer.recv(HEADER.size, socket.MSG_WAITALL))
    return request, flags, peer.recv(size, socket.MSG_WAITALL) if size else b""


def answer(peer: socket.socket, request: int, payload: bytes) -> None:
    peer.sendall(HEADER.pack(request, VERSION | REPLY, len(payload)) + payload)


def answering(*answers: bytes) -> Target:
    """Answers so many messages with these payloads, then closes."""

    def target(peer: socket.socket) -> None:
        for payload in answers:
            request, _, _ = receive(peer)
            answer(peer, request, payload)

    return target


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CannotConnect, match=r"nothing\.sock") as caught:
        Connection(str(tmp_path / "nothing.sock"))
    assert caught.value.hint
    assert "start the target" in caught.value.hint


def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(CannotConnect) as caught:
        Connection(str(path))
    assert caught.value.hint
    assert "not a socket" in caught.value.hint


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 107"):
        Connection(str(tmp_path / ("x" * 120)))


def test_an_answer_that_is_not_vhost_user(tmp_path: Path) -> None:
    def target(peer: socket.socket) -> None:
        receive(peer)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with (
        served(tmp_path / "s", target) as path,
        Connection(path) as connection,
        pytest.raises(PeerError, match="does not speak vhost-user"),
    ):
        connection.ask_u64(Request.GET_FEATURES)


def test_a_target_that_closes_instead_of_answering(tmp_path: Path) -> None:
    with (
        served(tmp_path / "s", lambda peer: None) as path,
        Connection(path) as connection,
        pytest.raises(TargetGone, match="GET_FEATURES"),
    ):
        connection.ask_u64(Request.GET_FEATURES)


def test_a_target_that_is_silent(tmp_path: Path) -> None:
    def target(peer: socket.socket) -> None:
        while peer.recv(100):
            pass

    with served(tmp_path / "s", target) as path, Connection(path, timeout_s=0.1) as connection:
        with pytest.raises(TargetGone, match=r"within 0\.1 s"):
            connection.ask_u64(Request.GET_FEATURES)
        assert not connection.gone()


def test_an_answer_to_another_question(tmp_path: Path) -> None:
    def target(peer: socket.socket) -> None:
        receive(peer)
        answer(peer, Request.GET_QUEUE_NUM, bytes(8))

    with (
        served(tmp_path / "s", target) as path,
        Connection(path) as connection,
        pytest.raises(PeerError, match="request 17"),
    ):
        connection.ask_u64(Request.GET_FEATURES)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_an_answer_of_the_wrong_size(tmp_path: Path, size: int) -> None:
    with (
        served(tmp_path / "s", answering(bytes(size))) as path,
        Connection(path) as connection,
        pytest.raises(PeerError, match=f"{size} bytes"),
    ):
        connection.ask_u64(Request.GET_FEATURES)


def test_a_refusal_is_an_error_only_when_answers_were_agreed(tmp_path: Path) -> None:
    seen: list[int] = []

    def target(peer: socket.socket) -> None:
        for _ in range(2):
            request, flags, _ = receive(peer)
            seen.append(flags & NEED_REPLY)
        answer(peer, request, (22).to_bytes(8, "little"))

    with served(tmp_path / "s", target) as path, Connection(path) as connection:
        connection.send(Request.SET_OWNER)
        connection.reply_ack = True
        with pytest.raises(PeerError, match="refused SET_OWNER"):
            connection.send(Request.SET_OWNER)
    assert seen == [0, NEED_REPLY]


@pytest.mark.parametrize("known", [60, 256])
def test_the_configuration_is_asked_for_in_the_size_that_a_target_knows(
    tmp_path: Path, known: int
) -> None:
    config = BlkConfig(1000, 126, 512, 4, True).pack().ljust(256, b"\0")
    asked: list[int] = []

    def target(peer: socket.socket) -> None:
        while True:
            request, _, payload = receive(peer)
            size = struct.unpack_from("=III", payload)[1]
            asked.append(size)
            fits = size == known
            answer(peer, request, payload[:12] + config[:size] if fits else b"")
            if fits:
                return

    with served(tmp_path / "s", target) as path, Connection(path) as connection:
        assert connection.get_config() == config[:known]
    assert asked[-1] == known


def test_a_target_without_any_configuration(tmp_path: Path) -> None:
    with (
        served(tmp_path / "s", answering(b"", b"")) as path,
        Connection(path) as connection,
        pytest.raises(PeerError, match="60 or 256"),
    ):
        connection.get_config()


def test_the_configuration_is_read_field_by_field() -> None:
    packed = BlkConfig(
        capacity_sectors=0x1122334455,
        seg_max=126,
        blk_size=4096,
        num_queues=7,
        writeback=True,
        max_discard_sectors=11,
        max_discard_seg=12,
        discard_sector_alignment=13,
        max_write_zeroes_sectors=14,
        max_write_zeroes_seg=15,
        write_zeroes_may_unmap=True,
    ).pack()
    assert DiskConfig.parse(packed[:60]) == DiskConfig(
        0x1122334455, 0, 126, 4096, 1, 7, 11, 12, 13, 14, 15, 1
    )


@pytest.mark.parametrize(
    ("features", "protocol", "blk_size", "message"),
    [
        (BlkFeature.RING_EVENT_IDX, ProtocolFeature.CONFIG, 512, "VIRTIO_F_VERSION_1"),
        (BlkFeature.VERSION_1, ProtocolFeature.MQ, 512, "no vhost-user-blk target"),
        (BlkFeature.VERSION_1, ProtocolFeature.CONFIG, 0, "blocks have 0 bytes"),
        (BlkFeature.VERSION_1, ProtocolFeature.CONFIG, 520, "blocks have 520 bytes"),
    ],
)
def test_a_target_of_another_kind(
    tmp_path: Path, features: int, protocol: int, blk_size: int, message: str
) -> None:
    offered = feature_mask(features, BlkFeature.BLK_SIZE, VHOST_USER_F_PROTOCOL_FEATURES)
    config = BlkConfig(1000, 126, blk_size, 1, False).pack()[:60]

    def target(peer: socket.socket) -> None:
        while data := peer.recv(HEADER.size, socket.MSG_WAITALL):
            request, _, size = HEADER.unpack(data)
            payload = peer.recv(size, socket.MSG_WAITALL) if size else b""
            if request == Request.GET_FEATURES:
                answer(peer, request, offered.to_bytes(8, "little"))
            if request == Request.GET_PROTOCOL_FEATURES:
                answer(peer, request, int(protocol).to_bytes(8, "little"))
            if request == Request.GET_CONFIG:
                answer(peer, request, payload[:12] + config)

    with served(tmp_path / "s", target) as path, pytest.raises(PeerError, match=message):
        VhostUserBlk.connect(path)
