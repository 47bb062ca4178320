"""Inflight regions that lie, against a target that others use: by the names of known faults."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from tests.fakes.driver import F_RING_PACKED, F_VERSION_1, Kind, Session
from tests.fakes.front_end import FrontEnd, HungUp, Inflight, Protocol, Refused
from tests.fakes.memory import GuestMemory
from tests.fakes.process import TargetProcess
from tests.hostile.vhost_user.conftest import Victim
from tests.hostile.vhost_user.test_messages import drain_to_the_end, negotiated

SIZE = 8
BYTES = 4096


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


def begin(victim: Victim, *, packed: bool = False) -> FrontEnd:
    """A session that negotiated INFLIGHT_SHMFD."""
    front = FrontEnd(victim.path)
    features = 1 << F_VERSION_1 | 1 << 30 | (1 << F_RING_PACKED if packed else 0)
    offered = front.get_protocol_features()
    assert offered >> Protocol.INFLIGHT_SHMFD & 1
    front.set_protocol_features(offered)
    front.set_features(features)
    return front


def start_with(front: FrontEnd, memory: GuestMemory, region: bytes) -> None:
    """A ring on a region that we have written ourselves."""
    fd = os.memfd_create("region")
    try:
        os.ftruncate(fd, BYTES)
        os.pwrite(fd, region, 0)
        front.set_inflight_fd(Inflight(fd, BYTES - 64, 0, 1, SIZE))
    finally:
        os.close(fd)
    front.set_mem_table(memory)
    places = [memory.allocate(256, 64, one_region=True) for _ in range(3)]
    for place in places:
        memory.write(place, bytes(256))
    front.set_vring_num(0, SIZE)
    front.set_vring_base(0, 0)
    front.set_vring_addr(0, *(memory.user_addr(place) for place in places))
    front.set_vring_enable(0)
    front.set_vring_kick(0, None)


def split(
    version: int = 1, num: int = SIZE, last: int = 0, used: int = 0, **marks: tuple[int, int]
) -> bytes:
    """vhost-user, QueueRegionSplit; marks: d<index>=(inflight, next)."""
    head = struct.pack("<QHHHH", 0, version, num, last, used)
    entries = [marks.get(f"d{i}", (0, 0)) for i in range(SIZE)]
    return head + b"".join(struct.pack("<B5xHQ", mark, after, 7) for mark, after in entries)


def packed(
    version: int = 1,
    num: int = SIZE,
    heads: tuple[int, int] = (0, 0),
    used: tuple[int, int] = (0, 0),
    wraps: tuple[int, int] = (1, 1),
    **entries: tuple[int, int, int, int],
) -> bytes:
    """QueueRegionPacked; entries: d<index>=(inflight, next, last, num)."""
    out = struct.pack("<QHHHHHHBB10x", 0, version, num, *heads, *used, *wraps)
    for i in range(SIZE):
        mark, after, last, count = entries.get(f"d{i}", (0, i + 1, 0, 0))
        out += struct.pack("<BxHHHQHHIQ", mark, after, last, count, 7, 0, 0, 0, 0)
    return out


SPLIT: dict[str, tuple[bytes, str]] = {
    "another version": (split(version=2), "has version 2"),
    "no entries": (split(num=0), "keeps 0 descriptors"),
    "more entries than it has": (split(num=9), "keeps 9 descriptors"),
    "a last batch that leads out": (split(last=8, used=0xFFFF), "lists descriptor 8"),
    "a last batch that leads out later": (
        split(last=1, used=0xFFFE, d1=(0, 0xFFFF)),
        "lists descriptor 65535",
    ),
    "a mark that is none": (split(d3=(2, 0)), "marks descriptor 3 of 8 with 2"),
    "a used index far away": (split(used=1000, d3=(1, 0)), "used entries behind"),
}
PACKED: dict[str, tuple[bytes, str]] = {
    "another version": (packed(version=0xFFFF), "has version 65535"),
    "more entries than it has": (packed(num=9), "keeps 9 descriptors"),
    "a used index outside": (packed(used=(8, 8)), "has used indexes 8 and 8"),
    "an old used index outside": (packed(used=(0, 0xFFFF)), "has used indexes 0 and 65535"),
    "a wrap counter that is none": (packed(wraps=(2, 2)), "wrap counters 2 and 2"),
    "a free list in a circle": (packed(d3=(0, 1, 0, 0)), "free list that comes back to entry 1"),
    "a chain of no length": (packed(heads=(8, 8), d0=(1, 1, 0, 0)), "chain of 0 descriptors"),
    "a chain that is too long": (packed(heads=(8, 8), d0=(1, 1, 0, 9)), "chain of 9 descriptors"),
    "a chain that leads out": (packed(heads=(8, 8), d0=(1, 8, 0, 2)), "leads to entry 8"),
    "a chain in a circle": (packed(heads=(8, 8), d0=(1, 0, 0, 2)), "leads to entry 0"),
    "two chains in one": (
        packed(heads=(8, 8), d0=(1, 1, 0, 1), d1=(1, 0, 0, 2)),
        "leads to entry 0",
    ),
    "a chain through the free list": (packed(heads=(1, 1), d0=(1, 1, 1, 2)), "leads to entry 1"),
    "a chain with a false end": (packed(heads=(8, 8), d0=(1, 1, 5, 2)), "does not end where"),
}


@pytest.mark.parametrize("what", SPLIT)
def test_nonsense_in_a_split_region(victim: Victim, memory: GuestMemory, what: str) -> None:
    region, sentence = SPLIT[what]
    with begin(victim) as front:
        with pytest.raises((Refused, HungUp)):
            start_with(front, memory, region)
        drain_to_the_end(front)
    victim.expect_end(sentence)


@pytest.mark.parametrize("what", PACKED)
def test_nonsense_in_a_packed_region(target: TargetProcess, memory: GuestMemory, what: str) -> None:
    region, sentence = PACKED[what]
    victim = Victim(target, "packed", target.controller("packed", "Bad0", packed_ring=True))
    try:
        with begin(victim, packed=True) as front:
            with pytest.raises((Refused, HungUp)):
                start_with(front, memory, region)
            drain_to_the_end(front)
        victim.expect_end(sentence)
    finally:
        target.rpc("vhost_delete_controller", ctrlr="packed", force=True)


def test_a_region_that_is_changed_while_it_is_used(victim: Victim) -> None:
    """Whatever it says then, only who wrote it is hurt, if anybody."""
    with begin(victim) as front, Session(victim.path) as other:
        region = front.get_inflight_fd(1, SIZE)
        front.set_inflight_fd(region)
        os.pwrite(region.fd, b"\xff" * 144, 0)
        os.close(region.fd)
        assert len(other.disk.read(0, 512)) == 512


LIES: dict[str, dict[str, int]] = {
    "CVE-2021-3839: too many queues": {"num_queues": 257},
    "CVE-2021-3839: no queues": {"num_queues": 0},
    "too many entries": {"queue_size": 1025},
    "no entries": {"queue_size": 0},
    "CVE-2020-10722: an offset and size that wrap": {"mmap_offset": (1 << 64) - 64},
    "a size of 2^64-1": {"mmap_size": (1 << 64) - 1, "mmap_offset": 64},
    "behind its file": {"mmap_offset": 1 << 30},
    "longer than its file": {"mmap_offset": BYTES - 64},
    "too small": {"mmap_size": 143},
    "nothing": {"mmap_size": 0},
    "not aligned": {"mmap_offset": 3},
}


@pytest.mark.parametrize("what", LIES)
def test_a_description_that_lies(victim: Victim, what: str) -> None:
    fd = os.memfd_create("region")
    os.ftruncate(fd, BYTES)
    told = Inflight(fd, 192, 0, 1, SIZE)._replace(**LIES[what])
    try:
        with begin(victim) as front:
            with pytest.raises((Refused, HungUp)):
                front.set_inflight_fd(told)
            drain_to_the_end(front)
    finally:
        os.close(fd)
    victim.expect_end("inflight region")


@pytest.mark.parametrize("kind", ["pipe", "socket", "file on disk"])
def test_a_descriptor_of_another_kind(victim: Victim, kind: str) -> None:
    ends = os.pipe()
    file = os.open(victim.target.log_path, os.O_RDONLY)
    fds = {"pipe": ends[0], "socket": os.dup(0), "file on disk": file}
    try:
        with begin(victim) as front:
            with pytest.raises((Refused, HungUp)):
                front.set_inflight_fd(Inflight(fds[kind], 192, 0, 1, SIZE))
            drain_to_the_end(front)
    finally:
        for fd in {*ends, file, fds["socket"]}:
            os.close(fd)
    victim.expect_end()


def test_cve_2020_10726_and_2022_0669_by_repetition(victim: Victim, target: TargetProcess) -> None:
    with begin(victim) as front:
        region = front.get_inflight_fd(256, 1024)
        front.set_inflight_fd(region)
        front.get_features()  # what came with the message before is closed by now
        before = target.holds()
        for _ in range(200):
            again = front.get_inflight_fd(256, 1024)
            os.close(again.fd)
            front.set_inflight_fd(region)
        os.close(region.fd)
        target.expect_holds(before)


def test_truncated_under_a_running_queue(victim: Victim) -> None:
    """A region of the front end's own has no seal."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, BYTES)
    told = Inflight(fd, BYTES - 64, 0, 1, 64)
    with Session(victim.path, without=[F_RING_PACKED], region=told) as session:
        session.disk.write(0, bytes(512))
        os.ftruncate(fd, 0)
        session.drivers[0].queue(Kind.OUT, 0, bytes(512))
        session.drivers[0].publish()
        assert session.front_end.hung_up()
    os.close(fd)
    victim.expect_end("inflight region was truncated")


def test_without_the_feature(victim: Victim) -> None:
    with negotiated(victim, without=1 << Protocol.INFLIGHT_SHMFD) as front, pytest.raises(HungUp):
        front.get_inflight_fd(1, SIZE)
    victim.expect_end("needs protocol feature INFLIGHT_SHMFD")
