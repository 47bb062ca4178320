"""QEMU is killed under a guest that writes; a new one takes the same disk, and nothing is lost.

What the guest was told to be on the disk is there, the target has let go of the dead one's
memory and region, and its requests in flight harm nobody.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess
from tests.e2e.conftest import BootGuest
from tests.fakes.process import wait_until

pytestmark = pytest.mark.needs_qemu

MIB = 1 << 20


def must(machine: Machine, script: str) -> str:
    done = machine.run(script, 120)
    assert done.code == 0, f"{script}: code {done.code}: {done.text}"
    return done.text.strip()


def guest_mappings(target: TargetProcess) -> int:
    """Memory of guests, and inflight regions."""
    maps = Path(f"/proc/{target.pid}/maps").read_text()
    return maps.count("/memfd:")


def test_a_new_monitor_goes_on_with_the_disk(
    target: TargetProcess, boot_guest: BootGuest, folder: Path
) -> None:
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, 64 * MIB)
    target.call("bdev_aio_create", name="F0", filename=str(image), block_size=512)
    target.call("vhost_create_blk_controller", ctrlr="disk", dev_name="F0")
    disk = [Disk(target.controller_socket("disk"), 2)]
    before = guest_mappings(target)

    first = boot_guest("first", disk)
    first.wait_ready()
    told = must(
        first,
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; sha256sum < /tmp/data;"
        "dd if=/tmp/data of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null;"
        "(while :; do dd if=/tmp/data of=/dev/vda bs=64k seek=256 oflag=direct; done)"
        " >/dev/null 2>&1 &",
    )
    assert guest_mappings(target) > before
    assert first._child is not None
    first._child.process.send_signal(signal.SIGKILL)
    first._child.process.wait()
    wait_until(lambda: guest_mappings(target) == before, "the dead guest's memory to go")

    second = boot_guest("second", disk)
    second.wait_ready()
    assert (
        must(second, "dd if=/dev/vda bs=64k count=128 iflag=direct 2>/dev/null|sha256sum") == told
    )
    must(second, "dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct conv=fsync 2>/dev/null")
    second.power_off()
