"""Snapshots of a disk that its guest is writing, and a second guest that boots from a clone.

The guest counts: it writes each number first into one cluster, then into another, and waits
for each to be stable. At any moment the first is the second's number, or one more; a snapshot
that is not of one moment shows something else sooner or later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.vm.guest_image import GuestImage
from drivebay.vm.hardware import Disk
from drivebay.vm.kvm import choose_accelerator
from drivebay.vm.machine import Machine, MachineSpec
from drivebay.vm.qemu import find_qemu
from drivebay.vm.target import TargetProcess
from tests.fakes.driver import Session

pytestmark = pytest.mark.needs_qemu

MIB = 1 << 20
FIRST, SECOND = 50 * MIB // 512, 60 * MIB // 512
SNAPSHOTS = 5

# A root file system of what the guest itself runs, in the first 40 MiB.
PREPARE = """
set -e
mke2fs /dev/vda 40960 > /dev/null
mount -t ext2 /dev/vda /mnt
for folder in bin dev proc sys tmp mnt modules; do mkdir /mnt/$folder; done
cp /bin/busybox /mnt/bin/
ln -s busybox /mnt/bin/sh
cp /init /mnt/
: > /mnt/modules/order
echo installed > /mnt/marker
umount /mnt
"""

COUNT = f"""
put() {{
    printf '%-512s' $n | dd of=/dev/vda bs=512 seek=$1 conv=notrunc,fsync 2> /dev/null
}}
n=100
while true; do
    n=$((n + 1))
    put {FIRST}
    put {SECOND}
done > /dev/null 2>&1 &
"""

BOOT_FROM_DISK = b"""#!/bin/busybox sh
export PATH=/bin
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module"
done < /modules/order
until busybox mount -t ext2 /dev/vda /mnt; do busybox usleep 100000; done
busybox umount /dev
exec busybox switch_root /mnt /init
"""


def counters(target: TargetProcess, volume: str, name: str) -> tuple[int, int]:
    """What the two clusters of a volume hold."""
    target.call("vhost_create_blk_controller", ctrlr=name, dev_name=volume)
    with Session(target.controller_socket(name)) as session:
        first, second = (int(session.disk.read(at, 512)) for at in (FIRST, SECOND))
    target.call("vhost_delete_controller", ctrlr=name)
    return first, second


def test_snapshots_of_a_busy_disk_are_of_one_moment_and_a_clone_boots(
    target: TargetProcess,
    boot_guest: Callable[[str, list[Disk]], Machine],
    guest_image: GuestImage,
    folder: Path,
    logs: Path,
) -> None:
    image = folder / "pool.img"
    image.touch(mode=0o600)
    os.truncate(image, 256 * MIB)
    target.call("bdev_aio_create", name="pool", filename=str(image), block_size=512)
    target.call("bdev_lvol_create_lvstore", bdev_name="pool", lvs_name="lvs", cluster_sz=MIB)
    target.call(
        "bdev_lvol_create", lvs_name="lvs", lvol_name="disk", size_in_mib=64, thin_provision=True
    )
    target.call("vhost_create_blk_controller", ctrlr="disk", dev_name="lvs/disk")
    guest = boot_guest("writer", [Disk(target.controller_socket("disk"), 1)])
    guest.wait_ready()
    assert guest.run(PREPARE, 60).code == 0
    assert guest.run(COUNT, 30).code == 0
    guest.run("sleep 1", 30)
    seen = []
    for number in range(SNAPSHOTS):
        target.call("bdev_lvol_snapshot", lvol_name="lvs/disk", snapshot_name=f"s{number}")
        guest.run("usleep 300000", 30)
        seen.append(counters(target, f"lvs/s{number}", f"s{number}"))
    for first, second in seen:
        assert first - second in (0, 1), seen
    assert len({first for first, _ in seen}) == SNAPSHOTS, "the guest did not go on writing"

    target.call("bdev_lvol_clone", snapshot_name="lvs/s0", clone_name="clone")
    target.call("vhost_create_blk_controller", ctrlr="clone", dev_name="lvs/clone")
    spec = MachineSpec([Disk(target.controller_socket("clone"), 1)], cpus=1)
    scripts = {"/init": BOOT_FROM_DISK}
    place = folder / "second-guest"
    with Machine(
        find_qemu(), choose_accelerator(), guest_image, spec, place, logs, scripts
    ) as clone:
        clone.wait_ready()
        found = clone.run("cat /marker; touch /made; sync; grep ' / ' /proc/mounts", 60)
        assert found.code == 0, found.text
        assert "installed" in found.text
        assert "/dev/vda / ext2" in found.text or "/dev/root / ext2" in found.text, found.text
        clone.power_off()
    guest.power_off()
