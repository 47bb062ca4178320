"""Who else has the file or device: named, refused, and never locked out for nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.bdev import file_guard
from drivebay.bdev.file import FileBdev
from drivebay.bdev.file_guard import device_holders, open_guarded
from drivebay.errors import HostError, InUse, UsageError
from tests.fakes.descriptors import held_fds
from tests.unit.conftest import LoopDevice, run

MIB = 1 << 20

HOLDER = """
import fcntl, os, struct, sys
path, kind = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
lock = struct.pack("=hhIqqiI", getattr(fcntl, kind), os.SEEK_SET, 0, 0, 0, 0, 0)
fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.img"
    made.write_bytes(bytes(MIB))
    return made


def open_bdev(path: Path | str, *, readonly: bool = False) -> FileBdev:
    return FileBdev("File0", None, str(path), 512, readonly)


@contextmanager
def locked_elsewhere(path: Path, kind: str) -> Iterator[int]:
    """Another process holds a lock on the file; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# ---- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "readonly"), [("F_WRLCK", False), ("F_WRLCK", True), ("F_RDLCK", False)]
)
def test_a_file_that_another_process_has_locked_names_it(
    path: Path, kind: str, readonly: bool
) -> None:
    with locked_elsewhere(path, kind) as pid:
        with pytest.raises(InUse, match=rf"is locked by .*\(pid {pid}\)") as refused:
            open_bdev(path, readonly=readonly)
        assert refused.value.hint
    open_bdev(path, readonly=readonly).close()


def test_readers_share_a_file_and_keep_writers_out(path: Path) -> None:
    with locked_elsewhere(path, "F_RDLCK"):
        first, second = open_bdev(path, readonly=True), open_bdev(path, readonly=True)
        with pytest.raises(InUse):
            open_bdev(path)
        first.close()
        second.close()


@contextmanager
def locked_by_nobody(path: Path) -> Iterator[socket.socket]:
    """By an open description that no process has: it waits in the socket that is given."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        fd = os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("=hhIqqiI", fcntl.F_WRLCK, *[0] * 6))
        socket.send_fds(ours, [b"."], [fd])
        os.close(fd)
        yield theirs


def test_the_last_requests_of_one_who_was_killed_are_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked_by_nobody(path) as last:
        monkeypatch.setattr("time.sleep", lambda seconds: last.close())
        open_bdev(path).close()


def test_a_lock_that_stays_is_refused_although_nobody_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_guard, "DYING_S", 0.05)
    with locked_by_nobody(path), pytest.raises(InUse, match="is locked by another process"):
        open_bdev(path)


def test_the_same_file_twice_in_one_target_is_refused(path: Path) -> None:
    """Two disks would write it without knowing of each other."""
    first = open_bdev(path)
    alias = path.with_name("alias.img")
    alias.symlink_to(path)
    hard = path.with_name("hard.img")
    hard.hardlink_to(path)
    for other in (path, alias, hard):
        with pytest.raises(InUse, match="is locked by"):
            open_bdev(other)
    first.close()
    open_bdev(alias).close()


def test_a_failed_open_leaves_no_lock(path: Path) -> None:
    for _ in range(3):
        with pytest.raises(UsageError):
            FileBdev("bad\nname", None, str(path), 512)
    open_bdev(path).close()


@pytest.mark.parametrize("writable", ["on", "off"])
def test_qemus_locks_are_respected(path: Path, writable: str) -> None:
    daemon = shutil.which("qemu-storage-daemon")
    assert daemon, "qemu-storage-daemon is missing; make setup installs it"
    socket = path.with_name("qsd.sock")
    pidfile = path.with_name("qsd.pid")
    export = f"type=vhost-user-blk,id=e,node-name=f,writable={writable}"
    process = subprocess.Popen(
        [
            daemon,
            "--pidfile", str(pidfile),
            "--blockdev", f"driver=file,node-name=f,filename={path},read-only=off",
            "--export", f"{export},addr.type=unix,addr.path={socket}",
        ],
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not pidfile.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(InUse, match=rf"qemu-storage-da\S* \(pid {process.pid}\)"):
            open_bdev(path)
    finally:
        process.terminate()
        process.wait(30)
    open_bdev(path).close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing.img"
    with pytest.raises(HostError, match=f"cannot open '{missing}': No such file") as refused:
        open_bdev(missing)
    assert refused.value.path == str(missing)
    with pytest.raises(HostError, match="Not a directory"):
        open_bdev(f"{_file(tmp_path)}/below")
    with pytest.raises(HostError, match="File name too long"):
        open_bdev(tmp_path / ("x" * 300))


def _file(folder: Path) -> Path:
    made = folder / "file"
    made.touch()
    return made


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    """Opening a named pipe waits for its other side, for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (str(tmp_path), str(fifo), "/dev/null", "/dev/tty"):
        with pytest.raises((UsageError, HostError)) as refused:
            open_bdev(path)
        assert path in str(refused.value)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800"], ids=ascii)
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises((UsageError, HostError)) as refused:
        open_bdev(path)
    str(refused.value).encode()


def test_a_file_that_may_not_be_written_gives_a_hint(path: Path) -> None:
    """As somebody who is not root, for root may write everything."""
    script = (
        "import sys\n"
        "from drivebay.bdev.file_guard import open_guarded\n"
        "from drivebay.errors import HostError\n"
        "import os\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: open_guarded(sys.argv[1], readonly=False, direct=False)\n"
        "except HostError as e: print(e, '|', e.hint)\n"
    )
    folder = Path("/dev/shm") / f"drivebay-guard-{os.getpid()}"
    folder.mkdir(mode=0o755)
    target = folder / "disk.img"
    try:
        target.write_bytes(bytes(MIB))
        target.chmod(0o444)
        done = subprocess.run(
            [sys.executable, "-c", script, str(target)],
            text=True, capture_output=True, timeout=60,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert done.stdout.strip() == (f"cannot open '{target}': Permission denied | ls -l {target}"), (
        done.stderr
    )


# ---- devices --------------------------------------------------------------------------------


def test_a_mounted_device_is_refused_by_name(loop_device: LoopDevice, tmp_path: Path) -> None:
    device = loop_device(16 * MIB)
    run("mkfs.ext4", "-q", str(device))
    place = tmp_path / "mounted"
    place.mkdir()
    run("mount", str(device), str(place))
    try:
        assert device_holders(str(device)) == [f"mounted on {place}"]
        with pytest.raises(InUse, match=f"'{device}' is in use: mounted on {place}"):
            open_bdev(device)
        with pytest.raises(InUse, match="mounted on"):
            open_bdev(device, readonly=True)
    finally:
        run("umount", str(place))
    assert device_holders(str(device)) == []
    open_bdev(device).close()


def test_swap_is_refused_by_name(loop_device: LoopDevice) -> None:
    device = loop_device(16 * MIB)
    run("mkswap", str(device))
    run("swapon", str(device))
    try:
        assert device_holders(str(device)) == [f"used as swap ({device})"]
        with pytest.raises(InUse, match=r"used as swap"):
            open_bdev(device)
    finally:
        run("swapoff", str(device))
    open_bdev(device).close()


def one_partition(first_sector: int, sectors: int) -> bytes:
    """A partition table of the oldest kind."""
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", first_sector, sectors)
    return bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa"


def test_a_device_with_a_mounted_partition_is_refused(
    loop_device: LoopDevice, tmp_path: Path
) -> None:
    device = loop_device(32 * MIB, "--partscan")
    with device.open("r+b") as disk:
        disk.write(one_partition(first_sector=2048, sectors=30 * MIB // 512))
    run("partx", "--update", str(device))
    partition = Path(f"{device}p1")
    if not partition.exists():  # no udev: make the node as it would
        number = Path(f"/sys/block/{device.name}/{partition.name}/dev").read_text()
        major, minor = (int(part) for part in number.split(":"))
        os.mknod(partition, 0o660 | 0o060000, os.makedev(major, minor))
    place = tmp_path / "mounted"
    place.mkdir()
    try:
        run("mkfs.ext4", "-q", str(partition))
        run("mount", str(partition), str(place))
        try:
            for held in (device, partition):
                assert device_holders(str(held)) == [f"mounted on {place}"]
                with pytest.raises(InUse, match=f"'{held}' is in use: mounted on {place}"):
                    open_bdev(held)
        finally:
            run("umount", str(place))
        whole = open_bdev(device)
        with pytest.raises(InUse):
            open_bdev(partition)
        whole.close()
    finally:
        run("partx", "--delete", str(device))
        partition.unlink(missing_ok=True)


def test_a_device_that_another_program_has_exclusively(loop_device: LoopDevice) -> None:
    device = loop_device(MIB)
    fd = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(InUse, match="another program has it open exclusively"):
            open_bdev(device)
    finally:
        os.close(fd)
    open_bdev(device).close()


# What md and the device mapper look like in sysfs. A stand-in: kernels without them
# (as in many small virtual machines) can run these tests, but make no such device.
HELD = {
    "holders/dm-3": "held by device mapper (LVM or multipath) dm-3",
    "holders/md127": "held by md RAID md127",
    "sdx1/holders/dm-0": "held by device mapper (LVM or multipath) dm-0",
}


@pytest.mark.parametrize("holder", HELD)
def test_what_md_or_lvm_holds_is_named(
    loop_device: LoopDevice, tmp_path: Path, holder: str
) -> None:
    device = loop_device(MIB)
    number = device.stat().st_rdev
    base = tmp_path / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
    (base / holder).mkdir(parents=True)
    if holder.startswith("sdx1"):
        (base / "sdx1/dev").write_text("259:7\n")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text("")
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    assert device_holders(str(device), tmp_path / "sys", proc) == [HELD[holder]]


def test_several_holders_are_all_named(loop_device: LoopDevice, tmp_path: Path) -> None:
    """A stand-in for sysfs and /proc, as above."""
    device = loop_device(MIB)
    number = device.stat().st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    base = tmp_path / "sys/dev/block" / name
    for part, part_number in (("x1", "259:1"), ("x2", "259:2")):
        (base / part / "holders").mkdir(parents=True)
        (base / part / "dev").write_text(f"{part_number}\n")
    (base / "x2/holders/md0").mkdir()
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(
        f"20 1 {name} / /whole rw - ext4 /dev/x rw\n"
        "21 1 259:1 / /first rw shared:1 - ext4 /dev/x1 rw\n"
        "22 1 8:99 / /other rw - ext4 /dev/y rw\n"
    )
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    assert device_holders(str(device), tmp_path / "sys", proc) == [
        "mounted on /whole",
        "mounted on /first",
        "held by md RAID md0",
    ]


def test_open_guarded_gives_back_what_it_cannot_lock(path: Path) -> None:
    with locked_elsewhere(path, "F_WRLCK"):
        before = held_fds()
        for _ in range(10):
            with pytest.raises(InUse):
                open_guarded(str(path), readonly=False, direct=False)
        assert held_fds() == before
