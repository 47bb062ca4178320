"""Polled rings: who is polled, and what becomes of requests that the device does not poll.

A disk that really has poll queues is in tests/e2e/test_polled_disk.py. Here a channel is made
to poll all the same: newer kernels refuse each of its requests, which then go through the other
ring; older ones complete them by interrupt, and they are reaped as polled ones are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.bdev import file
from drivebay.bdev.file import FileBdev
from drivebay.engines import uring_probe
from drivebay.engines.uring_probe import device_has_poll_queues
from tests.fakes.driver import BlkDriver, Kind, Status, segment_bytes
from tests.fakes.threaded import ThreadedMachine
from tests.unit.conftest import LoopDevice

MIB = 1 << 20
PATTERN = (bytes(range(1, 252)) * (4 * MIB // 251 + 1))[: 4 * MIB]


def test_a_device_without_poll_queues_is_not_polled(loop_device: LoopDevice) -> None:
    bdev = FileBdev("Loop0", None, str(loop_device(4 * MIB)), 512)
    assert bdev.direct
    assert not bdev.polled
    assert bdev.driver_specific()["aio"]["polled"] is False
    bdev.close()


def test_a_file_in_memory_is_not_polled(memory_folder: Path) -> None:
    path = memory_folder / "disk.img"
    path.write_bytes(PATTERN)
    bdev = FileBdev("File0", None, str(path), 512)
    assert not bdev.polled
    bdev.close()


@pytest.mark.parametrize(
    ("said", "found"), [("1\n", True), ("0\n", False), ("many\n", False), (None, False)]
)
@pytest.mark.parametrize("place", ["queue", "../queue"], ids=["disk", "partition"])
def test_the_device_says_whether_it_has_poll_queues(
    tmp_path: Path, said: str | None, found: bool, place: str
) -> None:
    """As sysfs has it: a partition is a folder in that of its disk."""
    with (tmp_path / "image").open("w") as image:
        number = os.fstat(image.fileno()).st_dev
        device = tmp_path / "disk" / "part"
        device.mkdir(parents=True)
        (tmp_path / f"{os.major(number)}:{os.minor(number)}").symlink_to(device)
        if said is not None:
            (device / place).mkdir()
            (device / place / "io_poll").write_text(said)
        assert device_has_poll_queues(image.fileno(), tmp_path) is found


def test_a_descriptor_that_the_kernel_does_not_poll_fails_the_trial(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One through the page cache, whatever its device says."""
    path = disk_folder / "disk.img"
    path.write_bytes(PATTERN)
    monkeypatch.setattr(uring_probe, "device_has_poll_queues", lambda _: True)
    before = rings()
    with path.open("rb") as image:
        assert not uring_probe.can_be_polled(image.fileno(), 4096)
    assert rings() == before


@pytest.fixture(params=["file", "device"])
def made_to_poll(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FileBdev:
    """A disk that is taken for a polled one."""
    if request.param == "device":
        make: Callable[[int], Path] = request.getfixturevalue("loop_device")
        path = make(4 * MIB)
        path.write_bytes(PATTERN)
    else:
        path = request.getfixturevalue("disk_folder") / "disk.img"
        path.write_bytes(PATTERN)
    monkeypatch.setattr(file, "can_be_polled", lambda *_: True)
    bdev = FileBdev("Disk0", None, str(path), 512)
    assert bdev.polled
    return bdev


def rings() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).endswith("[io_uring]") for link in links)


def all_kinds(disk: BlkDriver) -> None:
    content = bytearray(PATTERN)
    for turn in range(20):
        pending = []
        for i in range(12):
            start, length = 512 * i + turn, 512 * (1 + (turn * i) % 300)
            data = bytes([turn * 12 + i & 255 or 1]) * length
            content[512 * start : 512 * start + length] = data
            pending.append(disk.queue(Kind.OUT, start, data))
        disk.publish()
        assert {disk.wait(each).status for each in pending} == {Status.OK}
        disk.flush()
        assert disk.read(0, 3 * MIB) == bytes(content[: 3 * MIB])
    assert disk.request(Kind.WRITE_ZEROES, data=segment_bytes(8, 8)).status == Status.OK
    assert disk.read(8, 4096) == bytes(4096)


@pytest.mark.parametrize("poll_us", [0, 50])
def test_what_the_device_does_not_poll_completes_all_the_same(
    made_to_poll: FileBdev, poll_us: int
) -> None:
    """A disk may lose its poll queues while it is open: nothing fails or is lost for that."""
    before = rings()
    with ThreadedMachine(made_to_poll, poll_us=poll_us) as machine:
        disk = machine.add_queue(64)
        all_kinds(disk)
        assert rings() == before + 2
    assert rings() == before


def test_a_file_that_ends_too_early_fails_its_readers(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk_folder / "disk.img"
    path.write_bytes(PATTERN)
    monkeypatch.setattr(file, "can_be_polled", lambda *_: True)
    with ThreadedMachine(FileBdev("Disk0", None, str(path), 512), poll_us=0) as machine:
        disk = machine.add_queue(64)
        os.truncate(path, MIB)
        assert disk.request(Kind.IN, 3 * MIB // 512, room=4096).status == Status.IOERR
        assert disk.read(0, 4096) == PATTERN[:4096]
