"""Inflight regions as a session handles them; vhost-user, "Inflight I/O tracking"."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.memory.guest_memory import mapped_regions
from tests.fakes.dataplane import FakeBdev
from tests.fakes.descriptors import held_fds, more_fds_than, open_fds
from tests.fakes.front_end import FrontEnd, HungUp, Inflight, Protocol, Refused
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import (
    ALL_PROTOCOL,
    CONFIG_WCE,
    FLUSH,
    RING_SIZE,
    Serving,
    negotiate,
    start_ring,
)

WITH_INFLIGHT = ALL_PROTOCOL | 1 << Protocol.INFLIGHT_SHMFD
PACKED = 1 << 34
WRITEBACK_AT = 32


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    with Serving(tmp_path, monkeypatch, FakeBdev(), FakeBdev("Fake1")) as serving:
        serving.create(packed_ring=True)
        yield serving


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.close()


def connect(serving: Serving, name: str = "vhost.0", features: int = 0) -> FrontEnd:
    front = serving.connect(name)
    negotiate(front, features, WITH_INFLIGHT)
    return front


def refused(front: FrontEnd, region: Inflight) -> None:
    with pytest.raises((Refused, HungUp)):
        front.set_inflight_fd(region)


@pytest.mark.parametrize("padding", [0, 4])
def test_get_gives_a_region_that_cannot_shrink(serving: Serving, padding: int) -> None:
    with connect(serving) as front:
        region = front.get_inflight_fd(4, 128, padding=padding)
        assert (region.mmap_offset, region.num_queues, region.queue_size) == (0, 4, 128)
        # 16 bytes of header and 16 for each descriptor, each queue from a multiple of 64 on
        assert region.mmap_size >= 4 * 2112
        assert os.fstat(region.fd).st_size == region.mmap_size
        assert os.pread(region.fd, 4 * 2112, 0) == bytes(4 * 2112)
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 0)
        assert fcntl.fcntl(region.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        front.set_inflight_fd(region, padding=padding)
        os.close(region.fd)


@pytest.mark.parametrize(("features", "queue_bytes"), [(0, 2112), (PACKED, 4160)])
def test_a_queue_gets_its_own_part(
    serving: Serving, memory: GuestMemory, features: int, queue_bytes: int
) -> None:
    with connect(serving, features=features) as front:
        region = front.get_inflight_fd(3, 128)
        assert region.mmap_size == 3 * queue_bytes + 64
        front.set_inflight_fd(region)
        front.set_mem_table(memory)
        os.close(region.fd)
        for index in (2, 0):
            for fd in start_ring(front, memory, index):
                os.close(fd)
        told = [queue.terms["inflight"].index for queue in serving.plane.queues]
        assert told == [2, 0]


def test_without_a_region_nothing_is_kept(serving: Serving, memory: GuestMemory) -> None:
    with connect(serving) as front:
        front.set_mem_table(memory)
        for fd in start_ring(front, memory):
            os.close(fd)
        assert serving.plane.queues[0].terms["inflight"] is None


def keep_one_ring(front: FrontEnd) -> None:
    """The front end keeps a region for a single ring."""
    region = front.get_inflight_fd(1, RING_SIZE)
    front.set_inflight_fd(region)
    os.close(region.fd)


def test_a_queue_behind_the_region_ends_the_session(
    serving: Serving, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(serving) as front:
        keep_one_ring(front)
        front.set_mem_table(memory)
        with pytest.raises((Refused, HungUp)):
            start_ring(front, memory, 1)
    serving.until_empty()
    assert "queue 1 starts, but the inflight region has 1 queues" in caplog.text


def test_a_region_of_the_other_kind_of_ring_ends_the_session(
    serving: Serving, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(serving) as front:
        keep_one_ring(front)
        front.set_features(front.features | PACKED)
        front.set_mem_table(memory)
        with pytest.raises((Refused, HungUp)):
            start_ring(front, memory)
    serving.until_empty()
    assert "starts with a packed ring, but the inflight region was set for split" in caplog.text


def test_not_while_rings_are_started(serving: Serving, memory: GuestMemory) -> None:
    with connect(serving) as front:
        front.set_mem_table(memory)
        for fd in start_ring(front, memory):
            os.close(fd)
        region = front.get_inflight_fd(1, RING_SIZE)
        refused(front, region)
        os.close(region.fd)


# --- whose requests they are -----------------------------------------------------------------


def kept_region(serving: Serving, name: str = "vhost.0", **config: Any) -> Inflight:
    """The region of a session whose target goes away."""
    features = FLUSH | CONFIG_WCE
    with connect(serving, name, features) as front:
        region = front.get_inflight_fd(1, RING_SIZE)
        front.set_inflight_fd(region)
        if "writeback" in config:
            front.set_config(WRITEBACK_AT, bytes([config["writeback"]]))
    serving.until_empty()
    return region


def test_a_region_of_another_disk_is_refused(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.create("vhost.1", "Fake1")
    region = kept_region(serving)
    with connect(serving, "vhost.1") as front:
        refused(front, region)
    serving.until_empty()
    os.close(region.fd)
    assert "belong to another disk than bdev 'Fake1'" in caplog.text


def test_a_new_ram_disk_does_not_take_the_requests_of_the_old_one(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    bdev = serving.registry.bdevs["Fake0"]
    bdev.volatile_content = True
    region = kept_region(serving)
    bdev.content_id = "fake, and new"
    with connect(serving) as front:
        refused(front, region)
    serving.until_empty()
    os.close(region.fd)
    assert "bdev 'Fake0' is a RAM disk that is new and empty" in caplog.text
    assert "restart the guest" in caplog.text


def test_the_same_disk_is_resumed_by_any_name(serving: Serving) -> None:
    region = kept_region(serving)
    serving.registry.bdevs["Fake0"].name = "renamed"
    with connect(serving) as front:
        front.set_inflight_fd(region)
    os.close(region.fd)


@pytest.mark.parametrize("writeback", [0, 1])
def test_the_cache_mode_survives(serving: Serving, memory: GuestMemory, writeback: int) -> None:
    region = kept_region(serving, writeback=writeback)
    with connect(serving, features=FLUSH | CONFIG_WCE) as front:
        assert front.get_config(WRITEBACK_AT, 1) == b"\1"
        front.set_inflight_fd(region)
        assert front.get_config(WRITEBACK_AT, 1) == bytes([writeback])
        front.set_mem_table(memory)
        for fd in start_ring(front, memory):
            os.close(fd)
        assert serving.plane.queues[-1].write_through == (not writeback)
    os.close(region.fd)


def test_a_region_of_another_target_has_no_tail(serving: Serving) -> None:
    fd = os.memfd_create("theirs")
    os.ftruncate(fd, 2112)
    with connect(serving) as front:
        front.set_inflight_fd(Inflight(fd, 2112, 0, 1, 128))
    os.close(fd)


def test_after_a_reset_the_region_is_forgotten(serving: Serving, memory: GuestMemory) -> None:
    with connect(serving) as front:
        keep_one_ring(front)
        front.reset_device()
        front.set_features(front.features)
        front.set_mem_table(memory)
        for fd in start_ring(front, memory):
            os.close(fd)
        assert serving.plane.queues[0].terms["inflight"] is None


# --- nonsense, and greed ---------------------------------------------------------------------

LIES: dict[str, tuple[dict[str, int], str]] = {
    "no queues": ({"num_queues": 0}, "for 0 queues"),
    "too many queues": ({"num_queues": 257}, "for 257 queues"),
    "no entries": ({"queue_size": 0}, "of 0 entries"),
    "too many entries": ({"queue_size": 1025}, "of 1025 entries"),
    "too small": ({"mmap_size": 2111}, "has 2111 bytes, but 1 queues of 128 entries need 2112"),
    "behind its file": ({"mmap_offset": 1 << 20}, "has 8192"),
    "longer than its file": ({"mmap_offset": 8192 - 64}, "has 8192"),
    "unaligned": ({"mmap_offset": 1}, "must be a multiple of 64"),
    "an offset that wraps": ({"mmap_offset": (1 << 64) - 64}, "has 8192"),
    "a size of 2^64-1": ({"mmap_size": (1 << 64) - 1}, "has 8192"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_region_that_lies_is_refused_with_a_sentence(
    serving: Serving, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.WARNING)
    lies, sentence = LIES[what]
    before = open_fds(), mapped_regions()
    fd = os.memfd_create("lies")
    os.ftruncate(fd, 8192)
    told = Inflight(fd, 2112, 0, 1, 128)._replace(**lies)
    with connect(serving) as front:
        refused(front, told)
    os.close(fd)
    serving.until_empty()
    assert sentence in caplog.text
    assert "inflight region" in caplog.text
    assert mapped_regions() == before[1]
    assert more_fds_than(before[0]) == 0


def test_a_damaged_tail_is_refused(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    region = kept_region(serving)
    os.pwrite(region.fd, b"XX", region.mmap_size - 64)
    with connect(serving) as front:
        refused(front, region)
    os.close(region.fd)
    serving.until_empty()
    assert "something that no target has written" in caplog.text


@pytest.mark.parametrize(("num_queues", "queue_size"), [(0, 1), (257, 1), (1, 0), (1, 1025)])
def test_cve_2021_3839_numbers_of_get_inflight_fd(
    serving: Serving, num_queues: int, queue_size: int
) -> None:
    """DPDK took the front end's number of queues for the size of an array of its own."""
    with connect(serving) as front, pytest.raises(HungUp):
        front.get_inflight_fd(num_queues, queue_size)


def test_cve_2022_0669_and_2020_10726_repeated_messages_leak_nothing(serving: Serving) -> None:
    """DPDK leaked a descriptor for each SET_INFLIGHT_FD, and memory for each GET_INFLIGHT_FD."""
    with connect(serving) as front:
        region = front.get_inflight_fd(1, 128)
        front.set_inflight_fd(region)
        front.get_features()  # what came with the message before is closed by now
        before = held_fds(), mapped_regions()
        for _ in range(50):
            again = front.get_inflight_fd(256, 1024)
            front.set_inflight_fd(again)
            os.close(again.fd)
            front.set_inflight_fd(region)
        front.get_features()
        assert (held_fds(), mapped_regions()) == before
        os.close(region.fd)
    serving.until_empty()


def test_truncated_while_in_use_ends_only_this_session(serving: Serving) -> None:
    fd = os.memfd_create("theirs")
    os.ftruncate(fd, 1 << 16)
    with connect(serving) as front:
        front.set_inflight_fd(Inflight(fd, 1 << 16, 0, 1, 128))
        os.ftruncate(fd, 0)
        front.set_features(front.features)
    os.close(fd)
    serving.until_empty()
