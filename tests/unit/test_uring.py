"""The io_uring engine: more than fits, longer than one call takes, shared, and asleep."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.bdev.base import Channel
from drivebay.bdev.file import FileBdev
from drivebay.engines import uring
from drivebay.errors import HostError
from drivebay.reactor.mailbox import ControlMailbox
from drivebay.reactor.reactor import Reactor
from tests.fakes.driver import F_EVENT_IDX, BlkDriver, Framing, Kind, Status, segment_bytes
from tests.fakes.memory import PAGE, Layout, adjacent
from tests.fakes.ring import Segment
from tests.fakes.stepped import FEATURES, Machine
from tests.fakes.threaded import ThreadedMachine
from tests.unit.conftest import LoopDevice

MIB = 1 << 20
SIZE = 8 * MIB
PATTERN = (bytes(range(1, 252)) * (SIZE // 251 + 1))[:SIZE]
INDIRECT = Framing(indirect=True)


@pytest.fixture
def path(disk_folder: Path) -> Path:
    made = disk_folder / "disk.img"
    made.write_bytes(PATTERN)
    return made


@pytest.fixture
def bdev(path: Path) -> FileBdev:
    return FileBdev("File0", None, str(path), 512)


@pytest.fixture
def machine(bdev: FileBdev) -> Iterator[Machine]:
    with Machine(bdev) as made:
        yield made


def test_more_in_flight_than_the_ring_has_entries(machine: Machine) -> None:
    """256 entries; a gate lets 1,000 requests loose in one go."""
    disk = machine.add_queue(1024)
    machine.settle(machine.channel.gate())
    pending = [disk.queue(Kind.IN, i % 1024, room=512, framing=INDIRECT) for i in range(1000)]
    disk.publish()
    while machine.queues[0].counters().inflight < 1000:
        machine.step()
    machine.settle(machine.channel.ungate())
    for i, each in enumerate(pending):
        at = 512 * (i % 1024)
        assert disk.wait(each).data == PATTERN[at : at + 512]


def test_the_ring_is_full_many_times_over_with_writes_and_flushes(machine: Machine) -> None:
    disk = machine.add_queue(1024)
    machine.settle(machine.channel.gate())
    pending = []
    for i in range(900):
        if i % 100 == 99:
            pending.append(disk.queue(Kind.FLUSH, framing=INDIRECT))
        else:
            pending.append(disk.queue(Kind.OUT, i, bytes([i % 251 + 1]) * 512, framing=INDIRECT))
    disk.publish()
    while machine.queues[0].counters().inflight < 900:
        machine.step()
    machine.settle(machine.channel.ungate())
    assert {disk.wait(each).status for each in pending} == {Status.OK}
    for i in (0, 98, 100, 898):
        assert disk.read(i, 512) == bytes([i % 251 + 1]) * 512


def scattered(count: int) -> tuple[list[Layout], int]:
    """Neighbouring regions of a page each: a buffer over them is one iovec for each."""
    base = 1 << 33
    return [Layout(0, 8 * MIB), *adjacent([PAGE] * count, base)], base


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_more_iovecs_than_one_call_takes_are_continued(
    path: Path, memory_folder: Path, direct: bool
) -> None:
    """1,000 buffers and one over 31 regions: 1,031 iovecs, of which a call takes 1,024."""
    if not direct:
        path = memory_folder / "disk.img"
        path.write_bytes(PATTERN)
    layouts, base = scattered(31)
    bdev = FileBdev("File0", None, str(path), 512)
    assert bdev.direct is direct
    with Machine(bdev, layouts=layouts) as machine:
        disk = machine.add_queue(1024)
        memory = disk.memory
        places = [(memory.allocate(512, 512), 512) for _ in range(1000)]
        places.insert(500, (base, 31 * PAGE))
        length = sum(size for _, size in places)
        for kind, sector in ((Kind.IN, 8), (Kind.OUT, 4096)):
            header = memory.allocate(16)
            memory.write(
                header, kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
            )
            status = memory.allocate(1)
            data = [Segment(addr, size, kind == Kind.IN) for addr, size in places]
            pending = disk.queue_chain(
                [Segment(header, 16, False), *([] if kind == Kind.IN else data)],
                [*(data if kind == Kind.IN else []), Segment(status, 1, True)],
            )
            disk.publish()
            assert disk.wait(pending).status == Status.OK
            found = b"".join(memory.read(addr, size) for addr, size in places)
            assert found == PATTERN[4096 : 4096 + length]
        disk.flush()
    assert path.read_bytes()[MIB * 2 : MIB * 2 + length] == PATTERN[4096 : 4096 + length]


CUTS = [(4096, 3 * MIB, 512, 2 * MIB + 512), (5 * MIB + 512, 1024, 2 * MIB), (512,) * 5]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_buffers_longer_than_a_call_moves_are_continued_inside(
    path: Path, memory_folder: Path, direct: bool, cuts: tuple[int, ...]
) -> None:
    """A call moves 2 MiB: the next one begins inside a buffer, or at the following one."""
    if not direct:
        path = memory_folder / "disk.img"
        path.write_bytes(PATTERN)
    length = sum(cuts)
    with Machine(FileBdev("File0", None, str(path), 512), layouts=[Layout(0, 64 * MIB)]) as machine:
        disk = machine.add_queue()
        framing = Framing((16, *cuts), cuts)
        assert disk.read(3, length, framing) == PATTERN[1536 : 1536 + length]
        disk.write(1, PATTERN[7 : 7 + length], framing)
        disk.flush()
    assert path.read_bytes() == PATTERN[:512] + PATTERN[7 : 7 + length] + PATTERN[512 + length :]


def test_a_read_that_is_cut_short_is_continued_to_its_error(machine: Machine, path: Path) -> None:
    """The file ends in the middle of the request: the kernel gives the first half."""
    disk = machine.add_queue()
    os.truncate(path, MIB + 4096)
    done = disk.request(Kind.IN, MIB // 512, room=8192)
    assert done.status == Status.IOERR
    assert done.used_length == 1


def rings() -> int:
    """How many this process has open."""
    gc.collect()
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).endswith("[io_uring]") for link in links)


@pytest.fixture
def few_objects() -> Iterator[None]:
    """`rings` collects garbage each time: not among all that earlier tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_workers_that_open_the_first_files_together_get_one_ring(
    path: Path, few_objects: None, restless_threads: None
) -> None:
    for _ in range(20):
        before = rings()
        reactor = Reactor(0, ControlMailbox())
        bdev = FileBdev("File0", None, str(path), 512)
        start = threading.Barrier(4)
        channels: list[Channel] = []

        def open_one(
            bdev: FileBdev = bdev,
            reactor: Reactor = reactor,
            start: threading.Barrier = start,
            channels: list[Channel] = channels,
        ) -> None:
            start.wait()
            channels.append(bdev.open_channel(reactor))

        threads = [threading.Thread(target=open_one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(channels) == 4
        assert rings() == before + 1
        reactor.close()
        bdev.close()
        assert rings() == before


def test_a_channel_that_cannot_open_leaves_nothing(bdev: FileBdev) -> None:
    """No descriptor is left for the ring."""
    reactor = Reactor(0, ControlMailbox())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    maps = Path("/proc/self/maps").read_text().count("\n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, soft), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(50):
            with pytest.raises(HostError, match="io_uring"):
                bdev.open_channel(reactor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    assert Path("/proc/self/maps").read_text().count("\n") < maps + 25
    assert bdev.iostat()["read"].ops == 0
    channel = bdev.open_channel(reactor)
    assert channel.close().done
    reactor.close()
    bdev.close()


def registered() -> int:
    """Files in the tables of this process's rings (fdinfo of an io_uring)."""
    gc.collect()
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link).endswith("[io_uring]"):
            info = Path(f"/proc/self/fdinfo/{link.name}").read_text()
            _head, _colon, files = info.partition("UserFiles:")
            count += files.partition("UserBufs")[0].count("disk.img")
    return count


def test_a_file_is_in_the_rings_table_while_its_channel_is_open(
    machine: Machine, path: Path
) -> None:
    disk = machine.add_queue()
    assert registered() == 1
    disk.write(0, b"t" * 512)
    disk.flush()
    assert disk.read(0, 512) == b"t" * 512
    assert disk.request(Kind.DISCARD, data=segment_bytes(8, 8)).status == Status.OK
    pending = disk.queue(Kind.IN, 8, room=MIB)
    disk.publish()
    closed = machine.channel.close()
    machine.settle(closed)
    assert disk.wait(pending).status in (Status.OK, Status.IOERR)
    assert registered() == 0


def test_more_files_than_the_table_holds(disk_folder: Path) -> None:
    """Those without a place are used by their descriptor; places are used again."""
    path = disk_folder / "disk.img"
    path.write_bytes(PATTERN)
    path.chmod(0o444)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bdevs = [FileBdev("File0", None, str(path), 512, readonly=True) for _ in range(1100)]
    with Machine(bdevs[0]) as machine:
        first = machine.channel
        for _ in range(2):
            channels = []
            for bdev in bdevs[1:]:
                channels.append(bdev.open_channel(machine.reactor))
                machine.settle(channels[-1].activate())
            assert registered() == 1024
            for channel in (channels[0], channels[-1]):
                machine.channel = channel
                assert machine.add_queue().read(8, 512) == PATTERN[4096:4608]
                machine.stop_queue(-1)
            for channel in channels:
                machine.settle(channel.close())
            assert registered() == 1
        machine.channel = first
    for bdev in bdevs:
        bdev.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_older_kernel_gets_a_plainer_ring(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it refuses at set-up is left out."""
    monkeypatch.setattr(uring, "SETUP_FLAGS", (1 << 31, *uring.SETUP_FLAGS[1:]))
    with ThreadedMachine(FileBdev("File0", None, str(path), 512), poll_us=0) as machine:
        disk = machine.add_queue(64)
        for i in range(40):
            disk.write(i, bytes([i + 1]) * 512)
            disk.flush()
        assert [disk.read(i, 512)[0] for i in range(40)] == list(range(1, 41))


def test_two_files_on_one_reactor_share_it(machine: Machine, disk_folder: Path) -> None:
    other_path = disk_folder / "other.img"
    other_path.write_bytes(PATTERN[::-1])
    other = FileBdev("File1", None, str(other_path), 512, module="uring")
    first = machine.add_queue()
    channel = other.open_channel(machine.reactor)
    machine.settle(channel.activate())
    machine.channel, kept = channel, machine.channel
    second = machine.add_queue()
    machine.channel = kept
    assert rings() == 1
    for disk, data in ((first, PATTERN), (second, PATTERN[::-1])):
        assert disk.read(16, 4096) == data[8192:12288]
    machine.settle(channel.close())
    assert second.request(Kind.IN, 0, room=512).status == Status.IOERR
    assert first.read(0, 512) == PATTERN[:512]
    machine.stop_queue(1)
    other.close()


def test_completions_wake_a_reactor_that_sleeps(bdev: FileBdev) -> None:
    """Flushes take their time, and the reactor has nothing else to do meanwhile."""
    with ThreadedMachine(bdev, poll_us=0) as machine:
        disk = machine.add_queue(64)
        for i in range(40):
            disk.write(i, bytes([i + 1]) * 512)
            disk.flush()
        assert [disk.read(i, 512)[0] for i in range(40)] == list(range(1, 41))
        machine.until(lambda: machine.reactor.stats().sleeping, "sleep")
        before = machine.reactor.stats()
        pending = disk.queue(Kind.IN, 0, room=4096)
        disk.publish()
        disk.wait(pending)
        machine.until(lambda: machine.reactor.stats().sleeping, "sleep again")
        assert machine.reactor.stats().loops - before.loops < 100_000


@pytest.mark.parametrize("poll_us", [0, 20, 50])
def test_no_completion_is_lost_at_any_depth(bdev: FileBdev, poll_us: int) -> None:
    with ThreadedMachine(bdev, features=FEATURES & ~(1 << F_EVENT_IDX), poll_us=poll_us) as machine:
        drivers = [machine.add_queue(64) for _ in range(3)]
        for turn in range(60):
            pending = [
                (disk, disk.queue(Kind.IN, 8 * (turn + i), room=4096))
                for disk in drivers
                for i in range(1 + turn % 16)
            ]
            for disk in drivers:
                disk.publish()
            for disk, each in pending:
                assert disk.wait(each).status == Status.OK


# ---- a block device -------------------------------------------------------------------------


def flushes(device: Path) -> int:
    """Flush requests that the device has completed (Documentation/block/stat)."""
    return int(Path(f"/sys/block/{device.name}/stat").read_text().split()[15])


def test_write_through_makes_each_write_stable(loop_device: LoopDevice) -> None:
    """Counted by the device itself: RWF_DSYNC makes the kernel flush it after a write."""
    device = loop_device(4 * MIB)
    for write_through in (False, True):
        bdev = FileBdev("Loop0", None, str(device), 512)
        with Machine(bdev, write_through=write_through) as machine:
            disk = machine.add_queue()
            before = flushes(device)
            for i in range(5):
                disk.write(i, b"x" * 512)
            during = flushes(device) - before
            assert during >= 5 if write_through else during == 0
            disk.flush()
            assert flushes(device) > before + during


def test_blocks_of_the_device_are_those_of_the_disk(loop_device: LoopDevice) -> None:
    bdev = FileBdev("Loop0", None, str(loop_device(4 * MIB, "--sector-size", "4096")))
    assert bdev.block_size == 4096
    assert bdev.direct
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        check_odd_cuts(disk)


def check_odd_cuts(disk: BlkDriver) -> None:
    """A device of 4 KiB blocks takes buffers at 512 bytes, but no parts of blocks."""
    memory = disk.memory
    data = PATTERN[:8192]
    disk.write(8, data)
    for cuts in ((512, 7680), (4096, 512, 3584), (4096, 4096)):
        places = [memory.allocate(size, 512) for size in cuts]
        header, status = memory.allocate(16), memory.allocate(1)
        memory.write(header, bytes(8) + (8).to_bytes(8, "little"))
        writable = [Segment(addr, size, True) for addr, size in zip(places, cuts, strict=True)]
        pending = disk.queue_chain(
            [Segment(header, 16, False)], [*writable, Segment(status, 1, True)]
        )
        disk.publish()
        done = disk.wait(pending)
        assert (done.status, done.data) == (Status.OK, data), f"cut into {cuts}"


def test_a_block_device_is_cleared(loop_device: LoopDevice) -> None:
    device = loop_device(4 * MIB)
    bdev = FileBdev("Loop0", None, str(device), 512)
    assert bdev.direct, "a device is not in memory, though its node is"
    assert "write_zeroes" in bdev.io_types
    discards = int(Path(f"/sys/block/{device.name}/queue/discard_max_bytes").read_text()) > 0
    assert ("unmap" in bdev.io_types) is discards, "whether loop devices discard is the kernel's"
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        for unmap in (False, True):
            disk.write(0, PATTERN[:MIB])
            disk.write_zeroes(8, 16, unmap=unmap)
            assert disk.read(0, 16384) == PATTERN[:4096] + bytes(8192) + PATTERN[12288:16384]
        disk.write(0, PATTERN[:MIB])
        done = disk.request(Kind.DISCARD, data=segment_bytes(0, 2048))
        assert done.status == (Status.OK if discards else Status.UNSUPP)
        assert disk.read(0, MIB) == (bytes(MIB) if discards else PATTERN[:MIB])


# A filter of seccomp(2) that answers io_uring_setup with an errno, as a container's profile may.
FORBID = """
import ctypes, struct, sys
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50000 | int(sys.argv[1])),
         (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
from drivebay.engines.uring import UringEngine
from drivebay.errors import HostError
try: UringEngine()
except HostError as e: print(e, "|", e.hint)
"""
SENTENCES = [
    (errno.EPERM, "Operation not permitted | io_uring is switched off: see /proc/sys/kernel"),
    (errno.ENOSYS, "Function not implemented | the kernel has no io_uring, or this container's"),
    (errno.EMFILE, "Too many open files | Linux 6.1 or later is needed"),
]


@pytest.mark.parametrize(("code", "said"), SENTENCES)
def test_a_kernel_without_io_uring_is_named(code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORBID, str(code)], text=True, capture_output=True, timeout=60
    )
    assert done.stdout.startswith(f"cannot make an io_uring: {said}"), done.stderr
