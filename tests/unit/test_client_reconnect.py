"""A driver whose target goes away, and what it tells the next one."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_connection import TargetGone
from drivebay.engines.vhost_user_memory import DriverMemory
from drivebay.errors import PeerError
from tests.fakes.back_end import (
    FEATURES,
    GET_INFLIGHT_FD,
    PROTOCOL,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_MEM_TABLE,
    SET_VRING_BASE,
    BackEnd,
)
from tests.fakes.descriptors import held_fds

PACKED = 1 << 34
HANDED_OVER = (SET_FEATURES, GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_MEM_TABLE, SET_VRING_BASE)


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[BackEnd]:
    back_end = BackEnd(tmp_path / "s")
    yield back_end
    back_end.close()


def session(back_end: BackEnd) -> VhostUserBlk:
    return VhostUserBlk(str(back_end.path), slots=2, keep_inflight=True, timeout_s=5)


def base(back_end: BackEnd, number: int) -> int:
    (told,) = back_end.told(number, SET_VRING_BASE)
    return int(struct.unpack("=II", told.payload)[1])


def memory_of(disk: VhostUserBlk) -> DriverMemory:
    assert disk._memory is not None
    return disk._memory


def test_the_region_is_asked_for_once_and_given_to_each_target(back_end: BackEnd) -> None:
    back_end.start(connections=2)
    with session(back_end) as disk:
        back_end.hang_up()
        disk.reconnect(5)
        assert not disk.connection.gone()
    orders = [
        [one.request for one in told if one.request in HANDED_OVER] for told in back_end.sessions
    ]
    assert orders == [list(HANDED_OVER), [one for one in HANDED_OVER if one != GET_INFLIGHT_FD]]
    for number in (0, 1):
        (region,) = back_end.told(number, SET_INFLIGHT_FD)
        assert struct.unpack("=QQHH4x", region.payload) == (4096, 64, 1, 128)
        assert region.inodes == [back_end.inflight_inode]
    tables = [back_end.told(number, SET_MEM_TABLE)[0] for number in (0, 1)]
    assert tables[0] == tables[1]


def test_a_split_ring_goes_on_from_its_used_index(back_end: BackEnd) -> None:
    back_end.start(connections=2)
    with session(back_end) as disk:
        memory_of(disk).map[disk._layouts[0].used + 2] = 77
        back_end.hang_up()
        disk.reconnect(5)
    assert [base(back_end, number) for number in (0, 1)] == [0, 77]


def test_a_packed_ring_begins_with_both_wrap_counters_set(back_end: BackEnd) -> None:
    back_end.features = FEATURES | PACKED
    back_end.start(connections=2)
    with session(back_end) as disk:
        assert disk.packed
        back_end.hang_up()
        disk.reconnect(5)
    assert [base(back_end, number) for number in (0, 1)] == [1 << 15 | 1 << 31] * 2


def test_it_waits_for_a_target_that_takes_its_time(tmp_path: Path) -> None:
    first = BackEnd(tmp_path / "s")
    first.start()
    disk = session(first)
    first.hang_up()
    first.close()
    second: list[BackEnd] = []

    def come_back() -> None:
        second.append(BackEnd(tmp_path / "s"))
        second[0].start()

    timer = threading.Timer(0.2, come_back)
    timer.start()
    disk.reconnect(20)
    disk.close()
    timer.join()
    second[0].close()
    assert second[0].told(0, SET_INFLIGHT_FD)


def test_a_target_that_stays_away(back_end: BackEnd) -> None:
    back_end.start()
    disk = session(back_end)
    back_end.hang_up()
    back_end._listener.close()
    with pytest.raises(TargetGone, match=r"did not come back within 0\.1 s: cannot connect"):
        disk.reconnect(0.1)
    with pytest.raises(TargetGone, match="did not come back"):
        disk.reconnect(3600, gives_up=lambda: True)
    disk.close()


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("features", FEATURES | PACKED, "other features"),
        ("protocol", PROTOCOL & ~(1 << 3), "other features"),
        ("protocol", PROTOCOL & ~(1 << 12), "offers no INFLIGHT_SHMFD"),
        ("capacity_sectors", 999, "999 sectors of the 1000"),
    ],
)
def test_a_target_that_comes_back_as_another(
    back_end: BackEnd, changed: str, value: int, message: str
) -> None:
    back_end.start(connections=2)
    disk = session(back_end)
    setattr(back_end, changed, value)
    back_end.hang_up()
    with pytest.raises(PeerError, match=message):
        disk.reconnect(5)
    assert disk.connection.gone()
    disk.close()


def test_a_target_that_cannot_keep_requests_is_refused(back_end: BackEnd) -> None:
    back_end.protocol = PROTOCOL & ~(1 << 12)
    back_end.start()
    with pytest.raises(PeerError, match="cannot go on after a crash"):
        session(back_end)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "0 bytes"),
        (bytes(21), "21 bytes"),
        (struct.pack("=QQHH", 0, 0, 1, 128), "makes no inflight region"),
    ],
)
def test_an_inflight_region_that_is_none(back_end: BackEnd, answer: bytes, message: str) -> None:
    back_end.inflight_answer = answer
    back_end.start()
    before = held_fds()
    with pytest.raises(PeerError, match=message):
        session(back_end)
    back_end.wait()
    assert held_fds() == before
