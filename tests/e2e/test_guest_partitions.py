"""Linux in a guest reads the partition tables that `drivebay pool create --device` writes.

The disks are images, with blocks of 512 bytes (vda) and of 4,096 (vdb).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.disks.partition import NewPartition, plan_partition, write_table
from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

MIB = 1 << 20
SIZE = 64 * MIB


def add_partition(path: Path, block_bytes: int, size: int | None) -> NewPartition:
    descriptor = os.open(path, os.O_RDWR)
    try:
        new = plan_partition(
            lambda offset, length: os.pread(descriptor, length, offset),
            str(path), SIZE // block_bytes, block_bytes, "pool", size,
        )  # fmt: skip
        write_table(descriptor, new)
    finally:
        os.close(descriptor)
    return new


def test_a_kernel_finds_the_partitions_that_we_make(
    target: TargetProcess, boot_guest: Callable[[str, list[Disk]], Machine], folder: Path
) -> None:
    blocks = {"a": 512, "b": 4096}
    made: dict[str, list[NewPartition]] = {}
    for name, block_bytes in blocks.items():
        image = folder / f"{name}.img"
        image.touch(mode=0o600)
        os.truncate(image, SIZE)
        made[name] = [add_partition(image, block_bytes, size) for size in (16 * MIB, None)]
        target.call("bdev_aio_create", name=name, filename=str(image), block_size=block_bytes)
        target.call("vhost_create_blk_controller", ctrlr=f"c-{name}", dev_name=name)
    disks = [Disk(target.controller_socket(f"c-{name}")) for name in blocks]
    machine = boot_guest("guest", disks)
    machine.wait_ready()

    def run(script: str) -> str:
        done = machine.run(script, 120)
        assert done.code == 0, f"{script}: {done.text}"
        return done.text.strip()

    for name in blocks:
        disk = f"vd{name}"
        shown = run(f"for p in /sys/block/{disk}/{disk}[0-9]; do cat $p/start $p/size; done")
        assert [int(word) * 512 for word in shown.split()] == [
            number for new in made[name] for number in (new.offset, new.size)
        ]
        run(f"printf in-{name} | dd of=/dev/{disk}2 conv=fsync 2>/dev/null")
        content = (folder / f"{name}.img").read_bytes()
        assert content[made[name][1].offset :][:4] == f"in-{name}".encode()
    machine.power_off()
    for name in blocks:
        target.call("vhost_delete_controller", ctrlr=f"c-{name}")
        target.call("bdev_aio_delete", name=name)
