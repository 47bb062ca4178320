"""A Linux guest on packed rings: its driver is nobody's fake, and reboots go through the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess
from tests.e2e.conftest import BootGuest

pytestmark = pytest.mark.needs_qemu

PACKED_BIT = 34
QUEUES = 2
SECTORS = 131072


def must(machine: Machine, script: str) -> str:
    done = machine.run(script, 120)
    assert done.code == 0, f"{script}: code {done.code}: {done.text}"
    return done.text.strip()


@pytest.fixture(scope="module")
def guest(target: TargetProcess, boot_guest: BootGuest) -> Iterator[Machine]:
    """vda offers packed rings and gets them, vdb offers them to a guest that may not have them."""
    disks: Sequence[Disk] = [
        Disk(target.controller_socket(name), QUEUES, packed=name == "packed")
        for name in ("packed", "split")
    ]
    for name in ("packed", "split"):
        target.call("bdev_malloc_create", name=name, block_size=512, num_blocks=SECTORS)
        target.call("vhost_create_blk_controller", ctrlr=name, dev_name=name, packed_ring=True)
    machine = boot_guest("guest", disks)
    machine.wait_ready()
    yield machine
    machine.power_off()


def test_the_driver_has_negotiated_what_it_was_given(guest: Machine) -> None:
    """The bits stand in the order of their numbers."""
    for disk, wanted in (("vda", "1"), ("vdb", "0")):
        bits = must(guest, f"cat /sys/block/{disk}/device/features")
        assert bits[PACKED_BIT] == wanted, f"{disk} has {bits}"


def test_what_is_written_is_read_from_all_queues(guest: Machine) -> None:
    """From both processors, small and large, many times round the rings."""
    for disk in ("vda", "vdb"):
        told = must(
            guest,
            "dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null; sha256sum < /tmp/data;"
            "for cpu in 0 1; do taskset $((cpu + 1)) sh -c '"
            f"dd if=/tmp/data of=/dev/{disk} bs=4k seek='$((4096 * cpu))' oflag=direct 2>/dev/null;"
            f"dd if=/dev/{disk} bs=512k skip='$((32 * cpu))' count=32 iflag=direct 2>/dev/null"
            " | sha256sum'; done",
        ).splitlines()
        assert len(set(told)) == 1, told
        assert len(told) == 3


def test_a_file_system_outlives_a_reboot(guest: Machine) -> None:
    """The ring begins anew then, at index 0 with both wrap counters 1."""
    written = must(
        guest,
        "dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null; sha256sum < /tmp/data;"
        "dd if=/tmp/data of=/dev/vda bs=64k oflag=direct 2>/dev/null",
    )
    guest.reboot()
    read = must(guest, "dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum")
    assert read == written
