"""One file split in four, and four guests at once: each formats its part, writes, and checks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drivebay.vm.guest_agent import GuestOutput
from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

PARTS = 4
PART_BYTES = 16 << 20
BOOT_SECONDS = 180.0
RUN_SECONDS = 120.0

# Past the page cache the second time: the file system is mounted anew from the disk.
WORK = """
set -e
[ $(cat /sys/block/vda/size) = 32768 ]
mke2fs /dev/vda > /dev/null
mount -t ext2 /dev/vda /mnt
for n in 1 2 3; do dd if=/dev/urandom of=/mnt/data$n bs=64k count=32 2>/dev/null; done
written=$(cat /mnt/data* | sha256sum)
rm /mnt/data2
sync
kept=$(cat /mnt/data* | sha256sum)
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext2 /dev/vda /mnt
[ "$(cat /mnt/data* | sha256sum)" = "$kept" ]
umount /mnt
echo "$written"
"""


def checked_by_the_host(image: Path, part: int) -> None:
    """e2fsck finds no fault in a part, cut out of the file."""
    tool = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert tool, "e2fsck is missing: install e2fsprogs"
    cut = image.with_suffix(f".{part}")
    with image.open("rb") as whole:
        whole.seek(part * PART_BYTES)
        cut.write_bytes(whole.read(PART_BYTES))
    done = subprocess.run([tool, "-f", "-n", cut], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_four_guests_on_the_four_parts_of_a_file(
    target: TargetProcess, boot_guest: Callable[[str, list[Disk]], Machine], folder: Path
) -> None:
    image = folder / "whole.img"
    image.touch(mode=0o600)
    os.truncate(image, PARTS * PART_BYTES)
    target.call("bdev_aio_create", name="whole", filename=str(image), block_size=512)
    names = target.call("bdev_split_create", base_bdev="whole", split_count=PARTS)
    machines = []
    for name in names:
        target.call("vhost_create_blk_controller", ctrlr=f"c-{name}", dev_name=name)
        machines.append(boot_guest(name, [Disk(target.controller_socket(f"c-{name}"), 1)]))
    with ThreadPoolExecutor(PARTS) as pool:

        def work(machine: Machine) -> GuestOutput:
            machine.wait_ready(BOOT_SECONDS)
            return machine.run(WORK, RUN_SECONDS)

        found = list(pool.map(work, machines))
        assert [output.code for output in found] == [0] * PARTS, found
        assert len({output.text for output in found}) == PARTS
        list(pool.map(Machine.power_off, machines))
    for name in names:
        target.call("vhost_delete_controller", ctrlr=f"c-{name}")
    target.call("bdev_split_delete", base_bdev="whole")
    target.call("bdev_aio_delete", name="whole")
    for part in range(PARTS):
        checked_by_the_host(image, part)
