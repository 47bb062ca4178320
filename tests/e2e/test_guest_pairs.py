"""Two guests at once on one target: each on its own disk, and both on a shared one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

QUEUES = 2
BLOCKS = 65536
BOOT_SECONDS = 180.0

# Writes and verifies on both virtual processors at once, so that both queues work: each
# takes a half of the disk, and reads it back past the page cache.
BUSY = """
half() {
    taskset $1 dd if=/tmp/data of=/dev/vda bs=1M seek=$2 oflag=direct 2>/dev/null || exit 1
    sum=$(taskset $1 dd if=/dev/vda bs=1M skip=$2 count=8 iflag=direct 2>/dev/null | sha256sum)
    [ "$sum" = "$expected" ] || exit 2
}
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
expected=$(sha256sum < /tmp/data)
half 1 0 & one=$!
half 2 16 & two=$!
wait $one && wait $two && echo "$expected"
"""


@dataclass
class Pair:
    """Two guests: vda is each one's own disk, vdb the one that both have."""

    left: Machine
    right: Machine


@pytest.fixture(scope="module")
def pair(
    target: TargetProcess, boot_guest: Callable[[str, list[Disk]], Machine], folder: Path
) -> Iterator[Pair]:
    for name in ("left", "right", "shared"):
        target.call("bdev_malloc_create", name=name, block_size=512, num_blocks=BLOCKS)
        target.call("vhost_create_blk_controller", ctrlr=f"c-{name}", dev_name=name)
    shared = Disk(target.controller_socket("c-shared"), QUEUES)
    machines = [
        boot_guest(name, [Disk(target.controller_socket(f"c-{name}"), QUEUES), shared])
        for name in ("left", "right")
    ]
    for machine in machines:
        machine.wait_ready(BOOT_SECONDS)
    yield Pair(*machines)
    for machine in machines:
        machine.power_off()


def test_each_guest_works_on_both_of_its_queues(pair: Pair, target: TargetProcess) -> None:
    """The two work at the same time: the second starts before the first is waited for."""
    pair.left.run(f"({BUSY}) > /tmp/result 2>&1 &")
    right = pair.right.run(BUSY, 120)
    assert right.code == 0, right.text
    left = pair.left.run(
        "n=0; until [ -s /tmp/result ]; do n=$((n+1)); [ $n -lt 600 ] || exit 1;"
        "usleep 100000; done; cat /tmp/result",
        120,
    )
    assert left.code == 0, left.text
    sums = [output.text.split()[0] for output in (left, right)]
    assert all(len(text) == 64 for text in sums), sums
    assert sums[0] != sums[1]


def test_what_one_writes_on_a_shared_disk_the_other_reads(pair: Pair) -> None:
    written = pair.left.run(
        "dd if=/dev/urandom of=/tmp/shared bs=1M count=4 2>/dev/null;"
        "dd if=/tmp/shared of=/dev/vdb bs=1M conv=fsync 2>/dev/null && sha256sum < /tmp/shared"
    )
    assert written.code == 0, written.text
    read = pair.right.run("dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | sha256sum")
    assert read.code == 0, read.text
    assert read.text == written.text


def test_one_guest_leaves_and_the_other_never_notices(pair: Pair, target: TargetProcess) -> None:
    """A reboot ends all of a guest's sessions, the shared one too, and begins them again."""
    pair.left.reboot(BOOT_SECONDS)
    done = pair.right.run(BUSY, 120)
    assert done.code == 0, done.text
    left = pair.left.run("dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | sha256sum")
    right = pair.right.run("dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | sha256sum")
    assert left.text == right.text
    names = [controller["ctrlr"] for controller in target.call("vhost_get_controllers")]
    assert sorted(names) == ["c-left", "c-right", "c-shared"]
