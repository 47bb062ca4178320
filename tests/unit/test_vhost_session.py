"""One session and a front end that breaks the rules: what ends it, what does not, what leaks.

Against a real session on a real socket over a stand-in data plane; another
session beside it must never notice.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.vhost import session as session_module
from tests.fakes.dataplane import FakeBdev
from tests.fakes.descriptors import more_fds_than, open_fds
from tests.fakes.front_end import (
    FLAG_NEED_REPLY,
    HEADER,
    VERSION,
    FrontEnd,
    HungUp,
    Refused,
    Request,
)
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import (
    ALL_PROTOCOL,
    VERSION_1,
    Serving,
    negotiate,
    start_ring,
)

U64 = struct.Struct("=Q")


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


# (bytes as sent, the logged sentence)
BROKEN = {
    "version 0": (HEADER.pack(1, 0, 0), "message 1 has version 0"),
    "version 2": (HEADER.pack(1, 2, 0), "message 1 has version 2"),
    "a reply": (HEADER.pack(1, VERSION | 4, 0), "marked as a reply"),
    "request 0": (HEADER.pack(0, VERSION, 0), "message 0 is not served"),
    "unknown": (HEADER.pack(99, VERSION, 0), "message 99 is not served"),
    "SEND_RARP": (HEADER.pack(19, VERSION, 8) + bytes(8), "SEND_RARP (19) is not served"),
    "too long": (HEADER.pack(2, VERSION, 9) + bytes(9), "payload of 9 bytes (must be 8)"),
    "4 GiB": (HEADER.pack(5, VERSION, 0xFFFFFFFF), "payload of 4294967295 bytes"),
    "no features": (HEADER.pack(24, VERSION, 12) + bytes(12), "needs protocol feature CONFIG"),
    "unoffered": (HEADER.pack(2, VERSION, 8) + U64.pack(1 << 34), "bit 34, which were not"),
    "unoffered protocol": (HEADER.pack(16, VERSION, 8) + U64.pack(1 << 8), "bit 8, which"),
    "queue 256": (
        HEADER.pack(8, VERSION, 8) + struct.pack("=II", 256, 64),
        "queue 256 does not exist",
    ),
    "9 regions": (
        HEADER.pack(5, VERSION, 8) + struct.pack("=II", 9, 0),
        "came with 0 file descriptors",
    ),
    "no fd": (HEADER.pack(13, VERSION, 8) + bytes(8), "SET_VRING_CALL (13) came with 0 file"),
    "half a header": (HEADER.pack(1, VERSION, 0)[:5], "after 5 bytes of a message header"),
    "half a payload": (HEADER.pack(2, VERSION, 8) + bytes(3), "after 3 of 8 bytes of a payload"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_message_ends_its_session_with_one_sentence(
    serving: Serving, bystander: FrontEnd, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    data, sentence = BROKEN[case]
    with serving.connect() as front:
        front.send_raw(data)
        front.socket.shutdown(socket.SHUT_WR)
        assert front.hung_up()
    serving.until(lambda: len(serving.controllers.get("vhost.0").sessions) == 1)
    (text,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert text.startswith("session 'vhost.0s1' ends: ")
    assert sentence in text


@pytest.mark.parametrize("request_", [99, 20, Request.SET_VRING_KICK])
def test_need_reply_is_answered_non_zero_before_the_end(
    serving: Serving, bystander: FrontEnd, request_: int
) -> None:
    with serving.connect() as front:
        front.set_protocol_features(ALL_PROTOCOL)
        front.send(request_, bytes(8), flags=VERSION | FLAG_NEED_REPLY)
        reply = front.receive()
        assert (reply.request, reply.flags) == (request_, VERSION | 4)
        assert U64.unpack(reply.payload)[0] != 0
        assert front.hung_up()


def test_need_reply_without_reply_ack_is_not_answered(serving: Serving) -> None:
    with serving.connect() as front:
        front.send(Request.SET_OWNER, flags=VERSION | FLAG_NEED_REPLY)
        assert front.get_features()


def test_need_reply_on_a_message_that_has_an_answer_gives_one_answer(serving: Serving) -> None:
    with serving.connect() as front:
        negotiate(front)
        front.send(Request.GET_QUEUE_NUM, flags=VERSION | FLAG_NEED_REPLY)
        assert U64.unpack(front.receive().payload) == (256,)
        assert front.get_max_mem_slots() == 32


def test_an_honest_end_is_not_a_warning(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with serving.connect() as front:
        negotiate(front)
    serving.until_empty()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("pieces", [1, 3, 12])
def test_messages_arrive_in_any_pieces(serving: Serving, pieces: int) -> None:
    message = HEADER.pack(Request.SET_FEATURES, VERSION, 8) + U64.pack(VERSION_1)
    with serving.connect() as front:
        step = -(-len(message) // pieces)
        for start in range(0, len(message), step):
            front.send_raw(message[start : start + step])
        assert front.get_features()


def test_many_messages_in_one_write(serving: Serving) -> None:
    with serving.connect() as front:
        front.send_raw(HEADER.pack(Request.GET_FEATURES, VERSION, 0) * 50)
        assert {front.receive().request for _ in range(50)} == {Request.GET_FEATURES}


# Descriptors -----------------------------------------------------------------------------


def test_surplus_descriptors_are_closed_and_counted(serving: Serving) -> None:
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        (session,) = serving.controllers.get("vhost.0").sessions
        spare = [os.eventfd(0) for _ in range(6)]
        before = open_fds()
        for _ in range(3):
            front.tell(Request.SET_OWNER, fds=spare)
        front.tell(Request.SET_VRING_CALL, U64.pack(1 << 8), fds=spare[:1])
        regions = [region.fd for region in memory.regions]
        payload = struct.pack("=II", 2, 0) + b"".join(
            struct.pack("=4Q", r.guest_addr, r.size, r.user_addr, r.mmap_offset)
            for r in memory.regions
        )
        front.tell(Request.SET_MEM_TABLE, payload, fds=regions + spare)
        assert session.surplus_fds == 3 * 6 + 1 + 6
        assert not more_fds_than(before)  # mapped memory needs no descriptor
        for fd in spare:
            os.close(fd)


def test_more_than_eight_descriptors_end_the_session(
    serving: Serving, bystander: FrontEnd, caplog: pytest.LogCaptureFixture
) -> None:
    spare = [os.eventfd(0) for _ in range(9)]
    before = open_fds()
    with serving.connect() as front:
        front.send(Request.SET_OWNER, fds=spare)
        assert front.hung_up()
    serving.until(lambda: len(serving.controllers.get("vhost.0").sessions) == 1)
    assert "more than 8" in caplog.text
    assert not more_fds_than(before)
    for fd in spare:
        os.close(fd)


@pytest.mark.parametrize("request_", [12, 13, 14])
@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "memfd"])
def test_notifiers_must_be_eventfds(
    serving: Serving,
    bystander: FrontEnd,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    request_: int,
    kind: str,
) -> None:
    fds = _descriptors(kind, tmp_path)
    with serving.connect() as front:
        negotiate(front)
        with pytest.raises(Refused):
            front.tell(Request(request_), U64.pack(0), fds=[fds[-1]])
        assert front.hung_up()
    assert "must be an eventfd" in caplog.text
    for fd in fds:
        os.close(fd)


def _descriptors(kind: str, folder: Path) -> list[int]:
    if kind == "pipe":
        return list(os.pipe())
    if kind == "socket":
        return [end.detach() for end in socket.socketpair()]
    if kind == "file":
        return [os.open(folder / "file", os.O_CREAT | os.O_RDWR)]
    return [os.memfd_create("memory")]


def test_notifiers_are_made_non_blocking(serving: Serving) -> None:
    """The reactor writes to them, and must not be held up by their other holder."""
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        assert not any(os.get_blocking(fd) for fd in fds)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "file", "datagram"])
def test_the_back_end_channel_must_be_a_stream_socket(
    serving: Serving, bystander: FrontEnd, tmp_path: Path, kind: str
) -> None:
    if kind == "datagram":
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        fds = [end.detach() for end in pair]
    else:
        fds = _descriptors(kind, tmp_path)
    with serving.connect() as front:
        negotiate(front)
        with pytest.raises(Refused):
            front.tell(Request.SET_BACKEND_REQ_FD, fds=[fds[-1]])
    for fd in fds:
        os.close(fd)


def test_memory_that_is_refused_ends_the_session_and_leaks_nothing(
    serving: Serving, bystander: FrontEnd, tmp_path: Path
) -> None:
    from drivebay.memory.guest_memory import mapped_regions

    mapped = mapped_regions()
    with GuestMemory() as memory:
        first, second = memory.regions
        second.guest_addr = first.guest_addr + 4096  # overlaps
        with serving.connect() as front:
            negotiate(front)
            with pytest.raises(Refused):
                front.set_mem_table(memory)
            assert front.hung_up()
    serving.until(lambda: len(serving.controllers.get("vhost.0").sessions) == 1)
    assert mapped_regions() == mapped


# Waiting ---------------------------------------------------------------------------------


def test_a_slow_bdev_is_named_in_the_log(
    serving: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "SLOW_S", 0.2)
    with serving.connect() as front, GuestMemory() as memory:
        negotiate(front)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        serving.plane.hold = {"stop"}
        front.send(Request.GET_VRING_BASE, bytes(8))
        serving.until(lambda: "is slow" in caplog.text)
        serving.call(serving.plane.release)
        assert front.receive().request == Request.GET_VRING_BASE
        for fd in fds:
            os.close(fd)
    (sentence,) = [text for text in caplog.messages if "is slow" in text]
    assert "session 'vhost.0s0'" in sentence
    assert "GET_VRING_BASE" in sentence
    assert "bdev 'Fake0'" in sentence


# Many at once ----------------------------------------------------------------------------


def test_many_sessions_on_one_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Serving(tmp_path, monkeypatch, FakeBdev(), cores=2) as serving, GuestMemory() as memory:
        controller = serving.create()
        before = open_fds()
        fronts = [serving.connect() for _ in range(60)]
        fds: list[int] = []
        for front in fronts:
            negotiate(front)
            front.set_mem_table(memory)
        for front in fronts[:20]:
            fds += start_ring(front, memory)
        shown = serving.call(controller.describe)["sessions"]
        assert sorted(session["vid"] for session in shown) == list(range(60))
        assert sum(session["started"] for session in shown) == 20
        cores = [queue.channel.reactor.core for queue in serving.plane.queues]
        assert cores.count(0) == cores.count(1) == 10
        for front in fronts:
            front.close()
        for fd in fds:
            os.close(fd)
        serving.until_empty()
        assert not more_fds_than(before)
        assert serving.registry.channels == []


def test_queues_of_one_session_go_round_the_reactors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Serving(tmp_path, monkeypatch, FakeBdev(), cores=3) as serving, GuestMemory() as memory:
        serving.create(cpumask="0x5")
        with serving.connect() as front:
            negotiate(front)
            front.set_mem_table(memory)
            fds = [fd for index in range(4) for fd in start_ring(front, memory, index)]
            cores = [queue.channel.reactor.core for queue in serving.plane.queues]
            assert cores == [0, 2, 0, 2]
            assert len(serving.registry.channels) == 2  # one for each reactor, not for each queue
            for fd in fds:
                os.close(fd)


def test_hanging_up_in_the_middle_of_anything_leaks_nothing(serving: Serving) -> None:
    """Connect, send a prefix of a whole set-up, vanish; for every prefix."""
    with GuestMemory() as memory:
        before = open_fds()
        for steps in range(8):
            front = serving.connect()
            kick = os.eventfd(0)
            script = [
                lambda: negotiate(front),  # noqa: B023
                lambda: front.set_mem_table(memory),  # noqa: B023
                lambda: front.set_vring_num(0, 64),  # noqa: B023
                lambda: front.set_vring_kick(0, kick),  # noqa: B023
                lambda: start_ring(front, memory, 1),  # noqa: B023
                lambda: front.send_raw(HEADER.pack(9, VERSION, 40), [kick]),  # noqa: B023
                lambda: front.send_raw(bytes(39), [kick]),  # noqa: B023
            ]
            made: list[int] = []
            for step in script[:steps]:
                made += list(step() or ())  # type: ignore[no-untyped-call]
            front.close()
            for fd in (kick, *made):
                os.close(fd)
            serving.until_empty()
            assert not more_fds_than(before), f"after {steps} steps"


def test_a_session_that_ends_in_a_hang_up_raises_in_the_front_end(serving: Serving) -> None:
    with serving.connect() as front:
        serving.run(serving.controllers.delete("vhost.0", force=True))
        with pytest.raises(HungUp):
            front.get_features()
