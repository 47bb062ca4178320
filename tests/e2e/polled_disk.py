"""Runs in a guest, on an NVMe disk whose driver has poll queues: see test_polled_disk.py.

    python polled_disk.py DEVICE FOLDER

DEVICE is overwritten; a file system made on it is mounted at FOLDER. That requests are
polled for shows in /proc/interrupts: the disk interrupts for the others only.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from drivebay.bdev import file
from drivebay.bdev.file import FileBdev
from tests.fakes.driver import BlkDriver, Kind, Status
from tests.fakes.threaded import ThreadedMachine

MIB = 1 << 20
SIZE = 2 * MIB
ROUNDS = 5
DEPTH = 10


def interrupts() -> int:
    """Of the disk's queues; its first one is for commands about the disk itself."""
    table = Path("/proc/interrupts").read_text()
    lines = re.findall(r"^ *\d+:((?: +\d+)+) .*nvme0q[1-9]", table, re.MULTILINE)
    assert lines, table
    return sum(int(count) for line in lines for count in line.split())


def counted(what: Callable[[], object]) -> int:
    """The interrupts during it."""
    before = interrupts()
    what()
    return interrupts() - before


def write_and_read(disk: BlkDriver) -> bytes:
    """At depth, of many lengths; all is read again. Returns what the disk begins with."""
    numbers = random.Random(1)
    part = SIZE // DEPTH // 512
    content = bytearray(SIZE)
    disk.write(0, bytes(SIZE))
    for _ in range(ROUNDS):
        pending = []
        for i in range(DEPTH):
            start = i * part + numbers.randrange(8)
            data = numbers.randbytes(512 * numbers.choice((1, 8, 11, 64, 256)))
            content[start * 512 : start * 512 + len(data)] = data
            pending.append(disk.queue(Kind.OUT, start, data))
        disk.publish()
        assert {disk.wait(each).status for each in pending} == {Status.OK}
    read(disk, bytes(content))
    return bytes(content)


def read(disk: BlkDriver, content: bytes) -> None:
    for turn in range(ROUNDS):
        places = range(8 * turn, SIZE // 512 - 64, SIZE // 512 // DEPTH)
        pending = [(at, disk.queue(Kind.IN, at, room=16384)) for at in places]
        disk.publish()
        for at, each in pending:
            assert disk.wait(each).data == content[512 * at :][:16384]
    assert disk.read(0, SIZE) == content


def check_device(path: str) -> None:
    bdev = FileBdev("Disk0", None, path, 512)
    assert bdev.polled
    assert bdev.driver_specific()["aio"]["polled"] is True
    with ThreadedMachine(bdev, poll_us=0) as machine:
        disk = machine.add_queue(64)
        seen = counted(lambda: write_and_read(disk))
        print(f"{path}: {seen} interrupts", flush=True)
        assert seen == 0
        disk.flush()


def check_device_without(path: str) -> None:
    """The same disk without polling interrupts at each turn: so the count means something."""
    with mock.patch.object(file, "can_be_polled", return_value=False):
        bdev = FileBdev("Disk0", None, path, 512)
    assert not bdev.polled
    with ThreadedMachine(bdev, poll_us=0) as machine:
        disk = machine.add_queue(64)
        seen = counted(lambda: write_and_read(disk))
        print(f"{path}: {seen} interrupts without polling", flush=True)
        assert seen >= ROUNDS


def check_file(path: Path) -> None:
    """Its writes are not polled for: what the file system still has to write is no trap."""
    path.write_bytes(bytes(SIZE))
    os.truncate(path, 2 * SIZE)
    bdev = FileBdev("Disk0", None, str(path), 512)
    assert bdev.polled
    with ThreadedMachine(bdev, poll_us=0) as machine:
        disk = machine.add_queue(64)
        content = write_and_read(disk)
        disk.write(SIZE // 512 + 3, b"x" * 512)
        disk.flush()
        assert disk.read(SIZE // 512, 4096) == bytes(1536) + b"x" * 512 + bytes(2048)
        os.sync()
        # A file system may write in the background: the quietest of three counts is the reads'.
        seen = min(counted(lambda: read(disk, content)) for _ in range(3))
        print(f"{path}: {seen} interrupts", flush=True)
        assert seen < ROUNDS


def main(device: str, folder: str) -> None:
    check_device(device)
    check_device_without(device)
    # Nothing is left to initialise later, and reads change no times: both would interrupt.
    make = ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device]
    subprocess.run(make, check=True, timeout=60)
    mount = ["mount", "-t", "ext4", "-o", "noatime", device, folder]
    subprocess.run(mount, check=True, timeout=60)
    check_file(Path(folder) / "disk.img")
    print("everything was polled", flush=True)


main(*sys.argv[1:])
