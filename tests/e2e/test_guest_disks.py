"""One guest with one disk of each kind, and what Linux makes of each.

The disks are, in this order:
    vda  files   a file with ext4 on it          vdd  fixed   a file, read-only
    vdb  sparse  a file, nothing in it at first  vde  tiny    a file on a too small file system
    vdc  empty   a null device                   vdf  broken  a file that fails each fsync
The last two need mounts, which only root may make; without root the guest has the first four.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

MIB = 1 << 20
SECTORS_PER_MIB = 2048
QUEUES = 2
IS_ROOT = os.geteuid() == 0


class Guest:
    """The booted machine; commands that must succeed are the usual case."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def must(self, script: str, timeout_s: float = 120) -> str:
        done = self.machine.run(script, timeout_s)
        assert done.code == 0, f"{script}: code {done.code}: {done.text}"
        return done.text.strip()

    def fails(self, script: str) -> str:
        done = self.machine.run(script, 120)
        assert done.code != 0, f"{script} was expected to fail, and printed {done.text}"
        return done.text

    def wait_for_sectors(self, disk: str, sectors: int) -> None:
        """The kernel learns of a new size by an interrupt; give it time."""
        self.must(
            f'n=0; until [ "$(cat /sys/block/{disk}/size)" = {sectors} ]; do '
            f"n=$((n + 1)); [ $n -lt 300 ] || exit 1; usleep 100000; done"
        )


@contextmanager
def tiny_file_system(folder: Path) -> Iterator[Path]:
    path = folder / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tiny", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextmanager
def file_that_fails_fsync(folder: Path) -> Iterator[Path]:
    """A FUSE file of qemu-storage-daemon, whose blkdebug layer answers each flush with EIO."""
    path, backing = folder / "broken.img", folder / "broken.backing"
    path.touch()
    sparse_file(backing, 16)
    layer = (
        f"driver=blkdebug,node-name=b0,image.driver=file,image.filename={backing},"
        "inject-error.0.event=none,inject-error.0.iotype=flush,"
        "inject-error.0.errno=5,inject-error.0.once=off"
    )
    export = f"type=fuse,id=x,node-name=b0,mountpoint={path},writable=on"
    command = ["qemu-storage-daemon", "--blockdev", layer, "--export", export]
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + 30
            while path.stat().st_size == 0:
                assert daemon.poll() is None, "qemu-storage-daemon ended at once"
                assert time.monotonic() < deadline, "no FUSE file after 30 s"
                time.sleep(0.02)
            yield path
        finally:
            daemon.terminate()
            daemon.wait()


def sparse_file(path: Path, mib: int) -> Path:
    path.touch(mode=0o600)
    os.truncate(path, mib * MIB)
    return path


def make_ext4(path: Path) -> None:
    tool = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert tool, "mke2fs is missing: install e2fsprogs"
    subprocess.run([tool, "-q", "-t", "ext4", path], check=True)


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture(scope="module")
def guest(
    target: TargetProcess, boot_guest: Callable[[str, list[Disk]], Machine], folder: Path
) -> Iterator[Guest]:
    with ExitStack() as stack:
        make_ext4(sparse_file(folder / "files.img", 128))
        sparse_file(folder / "sparse.img", 64)
        (folder / "fixed.img").write_bytes(b"do not write" + bytes(8 * MIB - 12))
        files: dict[str, Path | None] = {
            "files": folder / "files.img",
            "sparse": folder / "sparse.img",
            "empty": None,
            "fixed": folder / "fixed.img",
        }
        if IS_ROOT:
            tiny = stack.enter_context(tiny_file_system(folder))
            files["tiny"] = sparse_file(tiny / "tiny.img", 64)
            files["broken"] = stack.enter_context(file_that_fails_fsync(folder))
        for name, path in files.items():
            if path is None:
                target.call("bdev_null_create", name=name, block_size=512, num_blocks=131072)
            else:
                target.call("bdev_aio_create", name=name, filename=str(path), block_size=512)
            target.call(
                "vhost_create_blk_controller",
                ctrlr=f"c-{name}",
                dev_name=name,
                readonly=name == "fixed",
            )
        disks = [Disk(target.controller_socket(f"c-{name}"), QUEUES) for name in files]
        machine = boot_guest("guest", disks)
        machine.wait_ready()
        yield Guest(machine)
        machine.power_off()
        for name in files:
            target.call("vhost_delete_controller", ctrlr=f"c-{name}")
            target.call("bdev_null_delete" if name == "empty" else "bdev_aio_delete", name=name)


def test_the_guest_sees_what_was_created(guest: Guest) -> None:
    shown = guest.must(
        "for d in /sys/block/vd*; do "
        "echo $(cat $d/serial) $(cat $d/size) $(ls $d/mq | wc -l) $(cat $d/ro); done"
    )
    expected = [
        f"files {128 * SECTORS_PER_MIB} {QUEUES} 0",
        f"sparse {64 * SECTORS_PER_MIB} {QUEUES} 0",
        f"empty {64 * SECTORS_PER_MIB} {QUEUES} 0",
        f"fixed {8 * SECTORS_PER_MIB} {QUEUES} 1",
        f"tiny {64 * SECTORS_PER_MIB} {QUEUES} 0",
        f"broken {16 * SECTORS_PER_MIB} {QUEUES} 0",
    ]
    assert shown.splitlines() == (expected if IS_ROOT else expected[:4])


def test_ext4_keeps_its_files_over_a_reboot(guest: Guest, folder: Path) -> None:
    written = guest.must(
        "mount -t ext4 /dev/vda /mnt && mkdir /mnt/dir &&"
        "dd if=/dev/urandom of=/mnt/dir/data bs=64k count=128 2>/dev/null &&"
        "echo hello > /mnt/dir/note && sync && sha256sum < /mnt/dir/data"
    )
    guest.machine.reboot()
    read = guest.must("mount -t ext4 /dev/vda /mnt && sha256sum < /mnt/dir/data")
    assert read == written
    assert guest.must("cat /mnt/dir/note") == "hello"
    guest.must("umount /mnt")

    # The host agrees with the guest about the file system's structure.
    tool = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert tool, "e2fsck is missing: install e2fsprogs"
    checked = subprocess.run(
        [tool, "-f", "-n", folder / "files.img"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_what_the_guest_writes_is_in_the_file(guest: Guest, folder: Path) -> None:
    told = guest.must(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null && sha256sum < /tmp/data &&"
        "dd if=/tmp/data of=/dev/vdb bs=1M seek=8 conv=fsync 2>/dev/null && rm /tmp/data"
    )
    with (folder / "sparse.img").open("rb") as file:
        file.seek(8 * MIB)
        assert hashlib.sha256(file.read(4 * MIB)).hexdigest() == told.split()[0]


def test_discard_gives_the_space_back(guest: Guest, folder: Path) -> None:
    path = folder / "sparse.img"
    guest.must("dd if=/dev/urandom of=/dev/vdb bs=1M seek=32 count=8 conv=fsync 2>/dev/null")
    full = allocated_bytes(path)
    guest.must(f"blkdiscard -o {32 * MIB} -l {8 * MIB} /dev/vdb")
    assert full - allocated_bytes(path) == 8 * MIB
    with path.open("rb") as file:
        file.seek(32 * MIB)
        assert file.read(8 * MIB) == bytes(8 * MIB)


def test_a_read_only_controller_refuses_to_change_anything(guest: Guest, folder: Path) -> None:
    assert guest.must("cat /sys/block/vdd/ro /sys/block/vdd/queue/discard_max_bytes") == "1\n0"
    assert guest.must("head -c 12 /dev/vdd") == "do not write"
    guest.fails("dd if=/dev/zero of=/dev/vdd bs=4k count=1 conv=fsync")
    guest.fails("blkdiscard /dev/vdd")
    assert (folder / "fixed.img").read_bytes()[:12] == b"do not write"


def test_a_live_guest_sees_a_null_device_grow(guest: Guest, target: TargetProcess) -> None:
    target.call("bdev_null_resize", name="empty", new_size=96)
    guest.wait_for_sectors("vdc", 96 * SECTORS_PER_MIB)


def test_a_live_guest_sees_and_uses_a_file_that_grew(
    guest: Guest, target: TargetProcess, folder: Path
) -> None:
    os.truncate(folder / "sparse.img", 80 * MIB)
    target.call("bdev_aio_rescan", name="sparse")
    guest.wait_for_sectors("vdb", 80 * SECTORS_PER_MIB)
    guest.must("echo the new end | dd of=/dev/vdb bs=1M seek=79 conv=sync,fsync 2>/dev/null")
    with (folder / "sparse.img").open("rb") as file:
        file.seek(79 * MIB)
        assert file.read(11) == b"the new end"


@pytest.mark.needs_root
def test_a_full_disk_is_an_error_in_the_guest_only(guest: Guest) -> None:
    guest.fails("dd if=/dev/urandom of=/dev/vde bs=1M count=16 conv=fsync")
    assert "I/O error, dev vde" in guest.must("dmesg | grep vde")
    # The same disk serves again when there is room, and the others never stopped.
    guest.must(f"blkdiscard -o 0 -l {16 * MIB} /dev/vde")
    guest.must("dd if=/dev/urandom of=/dev/vde bs=1M count=1 conv=fsync")
    guest.must("dd if=/dev/urandom of=/dev/vdb bs=1M count=1 conv=fsync")


@pytest.mark.needs_root
def test_the_write_cache_is_shown_and_flush_reaches_the_file(guest: Guest) -> None:
    assert guest.must("cat /sys/block/vda/queue/write_cache") == "write back"
    # Direct writes: they succeed without a flush, and only the fsync that is asked for fails.
    guest.must("dd if=/dev/zero of=/dev/vdf bs=4k count=1 oflag=direct")
    guest.fails("dd if=/dev/zero of=/dev/vdf bs=4k count=1 oflag=direct conv=fsync")
