"""A session's dirty log: when queues get it, when the former one goes, and what is refused.

Against a real session on a real socket over a stand-in data plane; what a queue marks is the
business of tests/spec/test_vhost_user_migration.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.memory.guest_memory import mapped_regions
from tests.fakes.dataplane import FakeQueue
from tests.fakes.descriptors import held_fds, more_fds_than, open_fds
from tests.fakes.front_end import FrontEnd, HungUp, Protocol, Refused, Request
from tests.fakes.memory import MIB, GuestMemory, Layout
from tests.unit.vhost_serving import (
    ALL_PROTOCOL,
    BIT_30,
    LOG_ALL,
    VERSION_1,
    Serving,
    negotiate,
    start_ring,
)

PLAIN = VERSION_1 | BIT_30
SMALL = (Layout(0, 2 * MIB),)
LOG_BYTES = 64  # for 2 MiB


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    before = open_fds(), mapped_regions()
    with Serving(tmp_path, monkeypatch) as running:
        running.create()
        yield running
    assert not more_fds_than(before[0])
    assert mapped_regions() == before[1]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(SMALL) as guest:
        yield guest


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def running(serving: Serving, memory: GuestMemory, rings: int = 1) -> Iterator[FrontEnd]:
    """A front end with that many rings, started and enabled."""
    fds: list[int] = []
    with serving.connect() as front:
        negotiate(front)
        front.set_mem_table(memory)
        for index in range(rings):
            fds += start_ring(front, memory, index)
        for queue in serving.plane.queues:
            queue.calls.clear()
        yield front
    for fd in fds:
        os.close(fd)


def send_log(front: FrontEnd, size: int = LOG_BYTES, offset: int = 0) -> None:
    with memfd(max(size + offset, 4096)) as fd:
        front.set_log_base(size, offset, fd)


def calls(serving: Serving) -> list[list[str]]:
    return [queue.calls for queue in serving.plane.queues]


def test_logging_is_switched_without_disturbing_a_ring(
    serving: Serving, memory: GuestMemory
) -> None:
    """SET_FEATURES that differs in VHOST_F_LOG_ALL alone neither stops nor enables anything."""
    with running(serving, memory, rings=2) as front:
        front.set_vring_enable(1, False)
        queues: list[FakeQueue] = serving.plane.queues
        send_log(front)
        assert [queue.log for queue in queues] == [None, None]
        front.set_features(PLAIN | LOG_ALL)
        assert None not in [queue.log for queue in queues]
        assert queues[0].log is queues[1].log
        front.set_features(PLAIN)
        assert [queue.log for queue in queues] == [None, None]
        assert len(queues) == 2
        assert [queue.enabled for queue in queues] == [True, False]
        assert all(queue.running for queue in queues)
        assert set(calls(serving)[0]) == {"set_log"}


def test_without_bit_30_switching_does_not_enable_what_was_disabled(
    serving: Serving, memory: GuestMemory
) -> None:
    with serving.connect() as front:
        front.set_protocol_features(ALL_PROTOCOL)
        front.set_features(VERSION_1)
        front.set_mem_table(memory)
        fds = start_ring(front, memory, enable=False)
        front.set_vring_enable(0, False)
        send_log(front)
        front.set_features(VERSION_1 | LOG_ALL)
        (queue,) = serving.plane.queues
        assert queue.enabled is False
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("bit", [9, 28, 29, 30])
def test_no_other_feature_may_change_while_a_ring_is_started(
    serving: Serving, memory: GuestMemory, bit: int
) -> None:
    with running(serving, memory) as front:
        send_log(front)
        with pytest.raises(Refused):
            front.set_features((PLAIN | LOG_ALL) ^ 1 << bit)
        assert front.hung_up()


def test_a_ring_that_starts_later_is_logged_from_the_start(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        fds = start_ring(front, memory, 1)
        first, second = serving.plane.queues
        assert second.log is first.log
        assert second.calls.index("set_log") < second.calls.index("start")
        for fd in fds:
            os.close(fd)


def test_a_rings_own_writes_are_logged_by_a_flag_of_its_addresses(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        (queue,) = serving.plane.queues
        assert not queue.log_rings
        desc, avail, used = (memory.user_addr(address) for address in ring_addresses())
        front.set_vring_addr(0, desc, avail, used, ring_addresses()[2])
        assert queue.log_rings
        front.set_vring_addr(0, desc, avail, used)
        assert not queue.log_rings
        assert queue.running
        assert set(queue.calls) == {"set_log"}


def ring_addresses() -> tuple[int, int, int]:
    """Where start_ring() puts the first ring of a fresh memory: a page for each part."""
    return 4096, 8192, 12288


def test_other_addresses_are_refused_with_the_flag_or_without(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front:
        desc, avail, used = (memory.user_addr(address) for address in ring_addresses())
        with pytest.raises(Refused):
            front.set_vring_addr(0, desc, avail, used + 4096, log=0x4000)
        assert front.hung_up()


def test_a_former_log_stays_mapped_until_all_queues_let_go_of_it(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory, rings=2) as front:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        one_log = mapped_regions()
        serving.plane.hold.add("set_log")
        with memfd(4096) as fd:
            asking = threading.Thread(target=front.set_log_base, args=(LOG_BYTES, 0, fd))
            asking.start()
            serving.plane.wait_for(lambda plane: len(plane.held) == 2)
            assert mapped_regions() == one_log + 1
            assert asking.is_alive(), "answered before the queues were asked"
            serving.call(serving.plane.release)
            asking.join()
        assert mapped_regions() == one_log


def test_without_logging_a_log_is_replaced_at_once(serving: Serving, memory: GuestMemory) -> None:
    with running(serving, memory) as front:
        send_log(front)
        before = mapped_regions()
        send_log(front, size=LOG_BYTES * 2)
        assert mapped_regions() == before
        assert calls(serving) == [[]]


def test_a_front_end_that_leaves_meanwhile_leaves_nothing_mapped(
    serving: Serving, memory: GuestMemory
) -> None:
    before = mapped_regions()
    with running(serving, memory) as front:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        serving.plane.hold |= {"set_log", "stop"}
        with memfd(4096) as fd:
            front.send(Request.SET_LOG_BASE, (64).to_bytes(8, "little") + bytes(8), [fd])
        serving.plane.wait_for(lambda plane: len(plane.held) == 1)
    serving.plane.wait_for(lambda plane: len(plane.held) == 2)
    assert mapped_regions() == before + 3, "a log or memory that a queue uses was unmapped"
    serving.call(serving.plane.release)
    serving.until_empty()
    assert mapped_regions() == before


def test_the_log_stays_for_the_next_time(serving: Serving, memory: GuestMemory) -> None:
    """A front end may bring the log once, and switch logging as often as it likes."""
    with running(serving, memory) as front:
        send_log(front)
        (queue,) = serving.plane.queues
        for _ in range(2):
            front.set_features(PLAIN | LOG_ALL)
            assert queue.log is not None
            front.set_features(PLAIN)
            assert queue.log is None


def test_log_all_without_a_log_marks_nothing_and_is_no_mistake(
    serving: Serving, memory: GuestMemory
) -> None:
    """Front ends exist that take every bit that is offered."""
    with running(serving, memory) as front:
        front.set_features(PLAIN | LOG_ALL)
        (queue,) = serving.plane.queues
        assert queue.log is None
        assert "migrating" not in shown_session(serving)


def shown_session(serving: Serving) -> dict[str, object]:
    (session,) = serving.call(serving.controllers.get("vhost.0").describe)["sessions"]
    assert isinstance(session, dict)
    return session


def test_a_migration_is_shown_while_it_lasts(serving: Serving, memory: GuestMemory) -> None:
    with running(serving, memory) as front:
        send_log(front)
        assert "migrating" not in shown_session(serving)
        front.set_features(PLAIN | LOG_ALL)
        assert shown_session(serving)["migrating"] is True
        front.get_vring_base(0)
        assert "migrating" not in shown_session(serving)


# Memory and the log ------------------------------------------------------------------------


@pytest.mark.parametrize("logging", [True, False])
def test_a_log_too_small_for_the_memory_is_refused(
    serving: Serving, memory: GuestMemory, caplog: pytest.LogCaptureFixture, logging: bool
) -> None:
    """Pages behind its end would be lost without a word."""
    with running(serving, memory) as front:
        if logging:
            front.set_features(PLAIN | LOG_ALL)
        with pytest.raises(HungUp):
            send_log(front, size=LOG_BYTES - 1)
    serving.until_empty()
    assert "has room for guest memory up to 0x1f8000, but there is some up to 0x200000" in (
        caplog.text
    )


def test_memory_that_outgrows_the_log_is_refused_while_rings_run(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front, GuestMemory((Layout(64 * MIB, MIB),)) as more:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        more.regions[0].user_addr = 0x6000_0000_0000
        with pytest.raises(Refused):
            front.add_mem_reg(more.regions[0])
        assert front.hung_up()


def test_memory_may_come_before_its_log_while_rings_stand_still(
    serving: Serving, memory: GuestMemory
) -> None:
    """So QEMU starts a device while it migrates: features, memory, rings, and the log last."""
    with running(serving, memory) as front, GuestMemory((Layout(0, 4 * MIB),)) as larger:
        send_log(front)
        front.get_vring_base(0)
        front.set_features(PLAIN | LOG_ALL)
        front.set_mem_table(larger)
        send_log(front, size=2 * LOG_BYTES)
        (_, queue) = serving.plane.queues[0], start_and_find(front, larger, serving)
        assert queue.log.covers == 4 * MIB


def start_and_find(front: FrontEnd, memory: GuestMemory, serving: Serving) -> FakeQueue:
    for fd in start_ring(front, memory):
        os.close(fd)
    return serving.plane.queues[-1]


# The messages themselves -------------------------------------------------------------------


def test_set_log_base_is_answered_once_with_need_reply_or_without(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front, memfd(4096) as fd:
        for flags in (1, 1 | 8):
            area = (64).to_bytes(8, "little") + bytes(8)
            front.send(Request.SET_LOG_BASE, area, [fd], flags=flags)
            reply = front.receive()
            assert (reply.request, reply.flags) == (Request.SET_LOG_BASE, 5)
            assert reply.payload == bytes(8)
        assert front.get_features()


def test_set_log_fd_takes_an_eventfd_and_keeps_nothing(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front:
        before = held_fds()
        eventfd = os.eventfd(0)
        front.set_log_fd(eventfd)
        os.close(eventfd)
        assert front.get_features()
        assert held_fds() == before


def test_set_log_fd_with_anything_else_ends_the_session(
    serving: Serving, memory: GuestMemory
) -> None:
    with running(serving, memory) as front, memfd(4096) as fd:
        with pytest.raises(Refused):
            front.set_log_fd(fd)
        assert front.hung_up()


def test_without_its_protocol_feature_a_log_is_refused(serving: Serving) -> None:
    with serving.connect() as front, memfd(4096) as fd:
        negotiate(front, protocol=ALL_PROTOCOL & ~(1 << Protocol.LOG_SHMFD))
        with pytest.raises(HungUp):
            front.set_log_base(64, 0, fd)


def test_a_reset_ends_logging(serving: Serving, memory: GuestMemory) -> None:
    with running(serving, memory) as front:
        send_log(front)
        front.set_features(PLAIN | LOG_ALL)
        front.reset_device()
        front.set_features(PLAIN)
        assert start_and_find(front, memory, serving).log is None
