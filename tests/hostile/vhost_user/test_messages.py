"""Messages that no front end may send: each ends its own session with a logged sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from tests.fakes.driver import F_VERSION_1, Session
from tests.fakes.front_end import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    VERSION,
    FrontEnd,
    HungUp,
    Protocol,
    Refused,
    Request,
    close_all,
)
from tests.fakes.process import TargetProcess
from tests.hostile.vhost_user.conftest import Victim

U64 = struct.Struct("=Q")
PAIR = struct.Struct("=II")
ADDR = struct.Struct("=IIQQQQ")
CONFIG = struct.Struct("=III")
REGION = struct.Struct("=QQQQ")
ALL_ONES = (1 << 64) - 1
HUGE = 0xFFFF_FFFF


def negotiated(victim: Victim, *, without: int = 0) -> FrontEnd:
    """A front end that did everything right so far, but has no memory and no rings."""
    front = FrontEnd(victim.path)
    offered = front.get_features()
    front.set_protocol_features(front.get_protocol_features() & ~without)
    front.set_owner()
    front.set_features(offered)
    return front


def drain_to_the_end(front: FrontEnd) -> None:
    """Take what was answered before the end, and wait for the end."""
    while True:
        try:
            message = front.receive()
        except HungUp:
            return
        close_all(message.fds)


A_PAGE = REGION.pack(0, 4096, 0, 0)
INFLIGHT = struct.pack("=QQHHI", 0, 0, 0xFFFF, 0xFFFF, 0)

Say = Callable[[FrontEnd], None]


def say(
    request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None
) -> Say:
    return lambda front: front.send(request, payload, flags=flags, size=size)


def vring(request: Request, index: int, value: int = 0) -> Say:
    return say(request, PAIR.pack(index, value))


FRESH: dict[str, Say] = {
    "nothing but ones": lambda front: front.send_raw(b"\xff" * 64),
    "nothing but zeroes": lambda front: front.send_raw(bytes(64)),
    "a size of 4 GiB": say(Request.GET_FEATURES, size=HUGE),
    "a table of 4 GiB": say(Request.SET_MEM_TABLE, size=HUGE),
    "a config of 2 GiB": say(Request.GET_CONFIG, size=0x7FFF_FFFF),
    "message 0": say(0),
    "message 99": say(99),
    "message 2^32-1": say(HUGE),
    "version 0": say(Request.GET_FEATURES, flags=0),
    "version 2": say(Request.GET_FEATURES, flags=2),
    "version 3": say(Request.GET_FEATURES, flags=3),
    "a reply": say(Request.GET_FEATURES, flags=VERSION | FLAG_REPLY),
    "a payload where there is none": say(Request.GET_FEATURES, b"\0" * 8),
    "a payload too short": say(Request.SET_FEATURES, b"\0" * 4),
    "no payload": say(Request.SET_FEATURES),
    "a payload too long": say(Request.SET_FEATURES, b"\0" * 9),
    "all feature bits": say(Request.SET_FEATURES, U64.pack(ALL_ONES)),
    "one unknown feature bit": say(Request.SET_FEATURES, U64.pack(1 << 63)),
    "packed ring, not offered": say(Request.SET_FEATURES, U64.pack(1 << 34 | 1 << F_VERSION_1)),
    "all protocol features": say(Request.SET_PROTOCOL_FEATURES, U64.pack(ALL_ONES)),
    "post-copy, not offered": say(Request.SET_PROTOCOL_FEATURES, U64.pack(1 << 8)),
    "inflight of 65,535 queues": say(Request.GET_INFLIGHT_FD, INFLIGHT),
    "a log without its feature": say(Request.SET_LOG_BASE, struct.pack("=QQ", ALL_ONES, ALL_ONES)),
    "memory slots without the feature": say(Request.GET_MAX_MEM_SLOTS),
    "a region without the feature": say(Request.ADD_MEM_REG, bytes(40)),
    "config without the feature": say(Request.GET_CONFIG, bytes(12)),
    "reset without the feature": say(Request.RESET_DEVICE),
    "post-copy": say(28),
    "iotlb": say(22, bytes(32)),
    "a kick before features": say(Request.SET_VRING_KICK, U64.pack(1 << 8)),
}

NEGOTIATED: dict[str, Say] = {
    "queue size 0": vring(Request.SET_VRING_NUM, 0, 0),
    "queue size 3": vring(Request.SET_VRING_NUM, 0, 3),
    "queue size 2,048": vring(Request.SET_VRING_NUM, 0, 2048),
    "queue size 2^31": vring(Request.SET_VRING_NUM, 0, 1 << 31),
    "queue size of queue 256": vring(Request.SET_VRING_NUM, 256, 64),
    "queue size of queue 2^32-1": vring(Request.SET_VRING_NUM, HUGE, 64),
    "base of queue 256": vring(Request.SET_VRING_BASE, 256, 0),
    "base 65,536": vring(Request.SET_VRING_BASE, 0, 65536),
    "base 2^32-1": vring(Request.SET_VRING_BASE, 0, HUGE),
    "enable queue 256": vring(Request.SET_VRING_ENABLE, 256, 1),
    "enable queue 2^32-1": vring(Request.SET_VRING_ENABLE, HUGE, 1),
    "enable with 2": vring(Request.SET_VRING_ENABLE, 0, 2),
    "stop queue 256": vring(Request.GET_VRING_BASE, 256),
    "stop queue 2^32-1": vring(Request.GET_VRING_BASE, HUGE),
    "addresses of queue 256": say(Request.SET_VRING_ADDR, ADDR.pack(256, 0, 0, 0, 0, 0)),
    "addresses of queue 2^32-1": say(Request.SET_VRING_ADDR, ADDR.pack(HUGE, 0, 0, 0, 0, 0)),
    "a short vring state": say(Request.SET_VRING_NUM, bytes(4)),
    "a short address": say(Request.SET_VRING_ADDR, bytes(39)),
    "a kick without its descriptor": say(Request.SET_VRING_KICK, U64.pack(0)),
    "a call without its descriptor": say(Request.SET_VRING_CALL, U64.pack(0)),
    "an error without its descriptor": say(Request.SET_VRING_ERR, U64.pack(0)),
    "a back-end channel without its descriptor": say(Request.SET_BACKEND_REQ_FD),
    "a region without its descriptor": say(Request.ADD_MEM_REG, bytes(8) + A_PAGE),
    "removing a region that is not there": say(Request.REM_MEM_REG, bytes(8) + A_PAGE),
    "a table of 9 regions": say(Request.SET_MEM_TABLE, PAIR.pack(9, 0) + bytes(32 * 9)),
    "a table that counts 9 and brings 8": say(
        Request.SET_MEM_TABLE, PAIR.pack(9, 0) + bytes(256)
    ),
    "a table that counts 2^32-1": say(Request.SET_MEM_TABLE, PAIR.pack(HUGE, 0) + bytes(32)),
    "a table that counts 1 and brings 2": say(Request.SET_MEM_TABLE, PAIR.pack(1, 0) + bytes(64)),
    "a table without descriptors": say(Request.SET_MEM_TABLE, PAIR.pack(1, 0) + A_PAGE),
    "a table of a byte": say(Request.SET_MEM_TABLE, b"\0"),
    "no config header": say(Request.GET_CONFIG, bytes(4)),
    "config of 300 bytes": say(Request.GET_CONFIG, CONFIG.pack(0, 300, 0) + bytes(300)),
    "a config write longer than told": say(Request.SET_CONFIG, CONFIG.pack(32, 1, 0) + bytes(9)),
    "a config write shorter than told": say(Request.SET_CONFIG, CONFIG.pack(32, 9, 0) + b"\0"),
    "a status of 16 bits": say(Request.SET_STATUS, U64.pack(0x1_0F)),
    "a reply": say(Request.SET_OWNER, flags=VERSION | FLAG_REPLY | FLAG_NEED_REPLY),
}  # fmt: skip


@pytest.mark.parametrize("what", FRESH)
def test_a_fresh_session_ends_by(victim: Victim, what: str) -> None:
    with FrontEnd(victim.path) as front:
        FRESH[what](front)
        drain_to_the_end(front)
        victim.expect_end()


@pytest.mark.parametrize("acks", [True, False], ids=["acks", "no-acks"])
@pytest.mark.parametrize("what", NEGOTIATED)
def test_a_negotiated_session_ends_by(victim: Victim, what: str, acks: bool) -> None:
    with negotiated(victim, without=0 if acks else 1 << Protocol.REPLY_ACK) as front:
        NEGOTIATED[what](front)
        drain_to_the_end(front)
        victim.expect_end()


def test_a_bad_message_that_needs_a_reply_gets_a_refusal_first(victim: Victim) -> None:
    with negotiated(victim) as front:
        with pytest.raises(Refused):
            front.set_vring_num(0, 3)
        drain_to_the_end(front)
        victim.expect_end("3")


# ---- half messages -------------------------------------------------------------------

WHOLE = HEADER.pack(Request.SET_FEATURES, VERSION, 8) + U64.pack(1 << F_PROTOCOL_FEATURES)


@pytest.mark.parametrize("length", [1, 4, 11, 12, 13, 19])
def test_half_a_message_and_a_hang_up(victim: Victim, length: int) -> None:
    with FrontEnd(victim.path) as front:
        front.send_raw(WHOLE[:length])
    victim.expect_end()


def test_half_a_message_and_silence_holds_up_nobody_else(victim: Victim) -> None:
    with FrontEnd(victim.path) as silent, FrontEnd(victim.path) as other:
        silent.send_raw(WHOLE[:13])
        for _ in range(50):
            assert other.get_features()
        silent.send_raw(WHOLE[13:])
        assert silent.get_features()


def test_a_message_byte_by_byte_is_as_good_as_whole(victim: Victim) -> None:
    with FrontEnd(victim.path) as front:
        for at in range(len(WHOLE)):
            front.send_raw(WHOLE[at : at + 1])
        assert front.get_features()


def test_a_front_end_that_never_reads_its_answers(victim: Victim) -> None:
    """Its replies fill the socket; it alone waits, and its going away is noticed."""
    ask = HEADER.pack(Request.GET_FEATURES, VERSION, 0)
    with FrontEnd(victim.path) as front, FrontEnd(victim.path) as other:
        front.socket.settimeout(0.2)
        try:
            for _ in range(200_000):
                front.send_raw(ask * 100)
        except TimeoutError:
            pass
        else:
            pytest.fail("the target reads without end what it cannot answer")
        assert other.get_features()


def test_a_connection_that_says_nothing(victim: Victim) -> None:
    for _ in range(20):
        FrontEnd(victim.path).close()
    victim.expect_sentence()


# ---- descriptors where none belong ---------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    "request_type", [Request.GET_FEATURES, Request.SET_OWNER, Request.GET_QUEUE_NUM]
)
def test_surplus_descriptors_are_closed(
    victim: Victim, target: TargetProcess, request_type: Request, count: int
) -> None:
    with negotiated(victim) as front:
        assert front.get_features()
        held = target.holds()
        read_end, write_end = os.pipe()
        for _ in range(50):
            front.send(request_type, fds=[write_end] * count, flags=VERSION)
            if request_type != Request.SET_OWNER:
                front.receive()
        assert front.get_features()
        os.close(write_end)
        target.expect_holds(held)
        # The pipe ends when its last writer is closed: nobody over there kept one.
        assert os.read(read_end, 1) == b""
        os.close(read_end)


@pytest.mark.parametrize("count", [9, 16, 64, 253])
def test_more_descriptors_than_a_message_may_carry(victim: Victim, count: int) -> None:
    read_end, write_end = os.pipe()
    with negotiated(victim) as front:
        front.send(Request.SET_OWNER, fds=[write_end] * count)
        drain_to_the_end(front)
        victim.expect_end("descriptors")
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def send_with_fds_on_each_byte(front: FrontEnd, fd: int) -> None:
    for at in range(len(WHOLE)):
        front.send_raw(WHOLE[at : at + 1], [fd] * 8)
    while True:
        front.receive()


def test_descriptors_spread_over_the_bytes_of_one_message(victim: Victim) -> None:
    """Each byte of a message can bring descriptors of its own: together they are too many."""
    read_end, write_end = os.pipe()
    with negotiated(victim) as front:
        with pytest.raises(HungUp):
            send_with_fds_on_each_byte(front, write_end)
        victim.expect_end("descriptors")
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


# ---- configuration space -------------------------------------------------------------

CONFIG_READS = {
    "size 0": (0, 0),
    "size 257": (0, 257),
    "size 2^32-1": (0, HUGE),
    "offset past the end": (256, 1),
    "an end past the end": (255, 2),
    "offset 2^32-1": (HUGE, 1),
    "an end that wraps": (HUGE, 256),
}


@pytest.mark.parametrize("what", CONFIG_READS)
def test_a_config_read_out_of_bounds_gets_nothing(victim: Victim, what: str) -> None:
    """Refused with an empty answer, or the session ends: never a byte from elsewhere."""
    offset, size = CONFIG_READS[what]
    with negotiated(victim) as front:
        payload = CONFIG.pack(offset, size, 0) + bytes(min(size, 244))
        front.send(Request.GET_CONFIG, payload)
        try:
            reply = front.receive()
        except HungUp:
            victim.expect_end()
        else:
            assert reply.payload == b""
            assert front.get_features()


def test_a_config_read_of_any_size_up_to_256_is_answered(victim: Victim) -> None:
    with negotiated(victim) as front:
        whole = front.get_config(0, 256)
        assert len(whole) == 256
        for offset, size in [(0, 1), (0, 60), (8, 4), (255, 1), (128, 128)]:
            assert front.get_config(offset, size) == whole[offset : offset + size]


@pytest.mark.parametrize("offset", [0, 8, 20, 34])
def test_read_only_fields_cannot_be_written(victim: Victim, offset: int) -> None:
    with negotiated(victim) as front:
        before = front.get_config(0, 60)
        with pytest.raises(Refused):
            front.set_config(offset, b"\xff\xff")
        assert front.get_config(0, 60) == before


# ---- right messages at the wrong moment ------------------------------------------------


def test_the_base_of_a_queue_that_never_started_is_answered(victim: Victim) -> None:
    with negotiated(victim) as front:
        assert front.get_vring_base(7) == 0
        front.set_vring_base(7, 4711)
        assert front.get_vring_base(7) == 4711
        assert front.get_features()


def test_a_running_queue_takes_no_new_size_or_base(victim: Victim) -> None:
    for request, value in [(Request.SET_VRING_NUM, 128), (Request.SET_VRING_BASE, 5)]:
        with Session(victim.path) as session:
            session.disk.write(0, b"\x01" * 512)
            session.front_end.send(request, PAIR.pack(0, value))
            drain_to_the_end(session.front_end)
            victim.expect_end(request.name)


def test_new_features_while_rings_run_end_the_session(victim: Victim) -> None:
    with Session(victim.path) as session:
        session.front_end.send(Request.SET_FEATURES, U64.pack(1 << F_VERSION_1))
        drain_to_the_end(session.front_end)
        victim.expect_end("SET_FEATURES")


def test_the_same_features_again_change_nothing(victim: Victim) -> None:
    """Migration repeats SET_FEATURES: rings must stay as they are."""
    with Session(victim.path) as session:
        session.disk.write(0, b"\x02" * 512)
        session.front_end.set_features(session.front_end.features)
        assert session.disk.read(0, 512) == b"\x02" * 512
