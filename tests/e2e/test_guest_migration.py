"""A guest moves from one QEMU to another on one host, and our target serves both.

vda is a file, whose I/O is asynchronous, with split rings; vdb is memory, whose I/O is done at
once, with packed ones. A worker on each of the guest's processors writes and checks blocks of
vda without pause, before, during and after; vdb is read into the guest's page cache while its
memory is copied, and looked at there afterwards: only our dirty log tells QEMU that those pages
changed.
"""

from __future__ import annotations

import hashlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.vm.guest_image import GuestImage
from drivebay.vm.hardware import Disk
from drivebay.vm.kvm import choose_accelerator
from drivebay.vm.machine import Machine, MachineSpec
from drivebay.vm.qemu import find_qemu
from drivebay.vm.qmp import Qmp
from drivebay.vm.target import TargetProcess

pytestmark = pytest.mark.needs_qemu

QUEUES = 2
MIB = 1 << 20
BLOCK = 65536
BLOCKS_EACH = 32
BOOT_SECONDS = 180.0
PATIENCE_S = 120.0
SLOW, UNLIMITED = 1 << 13, 1 << 33  # bytes a second

# $1 is the worker's number. /tmp/sums.$1/$slot holds what it wrote last to each slot.
WORKER = f"""
n=0
mkdir -p /tmp/sums.$1
while [ ! -e /tmp/stop ]; do
    slot=$((n % {BLOCKS_EACH}))
    place=$(($1 * {BLOCKS_EACH} + slot))
    head -c {BLOCK} /dev/urandom > /tmp/data.$1
    dd if=/tmp/data.$1 of=/dev/vda bs={BLOCK} seek=$place oflag=direct 2>/dev/null || break
    sha256sum < /tmp/data.$1 > /tmp/sums.$1/$slot
    other=$(((n * 7 + 3) % {BLOCKS_EACH}))
    if [ -e /tmp/sums.$1/$other ]; then
        place=$(($1 * {BLOCKS_EACH} + other))
        dd if=/dev/vda bs={BLOCK} skip=$place count=1 iflag=direct 2>/dev/null > /tmp/back.$1
        [ "$(sha256sum < /tmp/back.$1)" = "$(cat /tmp/sums.$1/$other)" ] || break
    fi
    n=$((n + 1))
    echo $n > /tmp/count.$1.new && mv /tmp/count.$1.new /tmp/count.$1
done
[ -e /tmp/stop ] && echo well > /tmp/end.$1 || echo "wrong after $n" > /tmp/end.$1
"""

# Writes so much memory without pause that a migration cannot keep up while this runs.
HOG = """
while [ ! -e /tmp/enough ]; do
    dd if=/dev/urandom of=/tmp/hog bs=64k count=64 conv=notrunc 2>/dev/null
done
"""


class Guest:
    """The guest, wherever it runs now."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def must(self, script: str) -> str:
        done = self.machine.run(script, PATIENCE_S)
        assert done.code == 0, f"{script}: code {done.code}: {done.text}"
        return done.text.strip()

    def start(self, name: str, script: str, *arguments: object) -> None:
        words = " ".join(map(str, arguments))
        self.must(
            f"cat > /tmp/{name} <<'END'\n{script}\nEND\n"
            f"(exec sh /tmp/{name} {words}) > /tmp/{name}.log 2>&1 &"
        )

    def counts(self) -> list[int]:
        return [int(n) for n in self.must("cat /tmp/count.0 /tmp/count.1").split()]

    def expect_progress(self, rounds: int = 5) -> None:
        """Both workers go on, and have seen nothing wrong."""
        goals = [count + rounds for count in self.counts()]
        wait_until(
            lambda: all(c >= g for c, g in zip(self.counts(), goals, strict=True)),
            lambda: f"rounds {goals}, at {self.counts()}: {self.must('cat /tmp/end.* || true')}",
        )


def wait_until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def disks(target: TargetProcess, folder: Path) -> list[Disk]:
    with (folder / "file.img").open("wb") as file:
        file.truncate(2 * BLOCKS_EACH * BLOCK)
    (folder / "file.img").chmod(0o600)
    target.call("bdev_aio_create", name="file", filename=str(folder / "file.img"), block_size=512)
    target.call("bdev_malloc_create", name="memory", block_size=512, num_blocks=16 * 2048)
    disks = []
    for name, packed in (("file", False), ("memory", True)):
        target.call(
            "vhost_create_blk_controller", ctrlr=f"c-{name}", dev_name=name, packed_ring=packed
        )
        disks.append(Disk(target.controller_socket(f"c-{name}"), QUEUES, packed))
    return disks


@pytest.fixture(scope="module")
def machine_of(
    guest_image: GuestImage, disks: list[Disk], folder: Path, logs: Path
) -> Callable[..., Machine]:
    def make(name: str, *, awaits_migration: bool = False) -> Machine:
        spec = MachineSpec(disks, cpus=2, awaits_migration=awaits_migration)
        return Machine(find_qemu(), choose_accelerator(), guest_image, spec, folder / name, logs)

    return make


@pytest.fixture(scope="module")
def guest(machine_of: Callable[..., Machine]) -> Iterator[Guest]:
    with machine_of("source") as machine:
        machine.wait_ready(BOOT_SECONDS)
        guest = Guest(machine)
        # The second disk gets its content, of which the guest's page cache keeps nothing.
        guest.must(
            "dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null;"
            "dd if=/tmp/data of=/dev/vdb bs=1M oflag=direct 2>/dev/null && rm /tmp/data"
        )
        # Linux forgets the pages of a disk that nobody holds open.
        guest.must("sleep 86400 < /dev/vdb > /dev/null 2>&1 &")
        for worker in range(2):
            guest.start(f"worker.{worker}", WORKER, worker)
        guest.must("until [ -e /tmp/count.0 -a -e /tmp/count.1 ]; do usleep 50000; done")
        # VIRTIO_F_RING_PACKED is bit 34 of what the driver took.
        bits = guest.must("cut -c 35 /sys/block/vda/device/features /sys/block/vdb/device/features")
        assert bits.split() == ["0", "1"]
        yield guest


def sessions(target: TargetProcess) -> list[list[dict[str, Any]]]:
    """Of each controller, in the order in which they began."""
    return [
        sorted(controller["sessions"], key=lambda session: int(session["id"]))
        for controller in target.call("vhost_get_controllers")
    ]


def migrating(target: TargetProcess) -> list[bool]:
    """Of each controller, whether its first session marks what it writes."""
    return [first.get("migrating", False) for first, *_others in sessions(target)]


def state_of(monitor: Qmp) -> str:
    return str(monitor.call("query-migrate").get("status"))


def passes(monitor: Qmp) -> int:
    return int(monitor.call("query-migrate").get("ram", {}).get("dirty-sync-count", 0))


def test_a_migration_that_is_given_up_leaves_all_as_it_was(
    guest: Guest, target: TargetProcess, folder: Path
) -> None:
    """Logging is switched on and off under rings that run, and nobody notices."""
    place = folder / "nowhere.sock"
    with socket.socket(socket.AF_UNIX) as nowhere, guest.machine.monitor() as monitor:
        nowhere.bind(str(place))
        nowhere.listen(1)
        place.chmod(0o666)
        assert migrating(target) == [False, False]
        monitor.call("migrate", uri=f"unix:{place}")
        connection, _ = nowhere.accept()  # and nothing is read from it
        with connection:
            wait_until(lambda: migrating(target) == [True, True], lambda: state_of(monitor))
            guest.expect_progress()
            monitor.call("migrate_cancel")
            wait_until(lambda: state_of(monitor) == "cancelled", lambda: state_of(monitor))
    assert migrating(target) == [False, False]
    guest.expect_progress()


def test_a_guest_moves_while_it_works_and_no_block_is_wrong(
    guest: Guest,
    target: TargetProcess,
    machine_of: Callable[..., Machine],
    folder: Path,
) -> None:
    source = guest.machine
    with machine_of("target", awaits_migration=True) as destination:
        place = folder / "target" / "in.sock"
        with source.monitor() as from_, destination.monitor() as to:
            to.call("migrate-incoming", uri=f"unix:{place}")
            from_.call("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=1)
            guest.start("hog", HOG)
            from_.call("migrate", uri=f"unix:{place}")
            wait_until(lambda: passes(from_) >= 2, lambda: state_of(from_))
            # So slow that what the guest has written since then lasts for minutes.
            from_.call("migrate-set-parameters", max_bandwidth=SLOW)
            guest.must("touch /tmp/enough")
            assert state_of(from_) == "active"
            started = [[session["started"] for session in both] for both in sessions(target)]
            assert started == [[True, False], [True, False]]
            # All memory was copied once. What is read now lands in pages that were.
            whole = guest.must("cat /dev/vdb | sha256sum")
            guest.expect_progress()
            assert migrating(target) == [True, True]
            assert state_of(from_) == "active"
            from_.call("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=2000)
            wait_until(lambda: state_of(from_) == "completed", lambda: state_of(from_))
            wait_until(lambda: to.call("query-status")["running"], lambda: "the guest to run")
        started = [[session["started"] for session in both] for both in sessions(target)]
        assert started == [[False, True], [False, True]]
        source.close()
        guest.machine = destination
        expect_cached(guest, whole)
        guest.expect_progress(BLOCKS_EACH // 2)
        expect_all_blocks(guest, folder / "file.img")
        destination.power_off()


def expect_cached(guest: Guest, whole: str) -> None:
    """The guest finds the second disk in its memory, as it is on the disk."""
    reads = "cut -c 1-8 /sys/block/vdb/stat"
    before = guest.must(reads)
    assert guest.must("cat /dev/vdb | sha256sum") == whole
    assert guest.must(reads) == before, "this was read from the disk, and proves nothing"
    guest.must("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.must("cat /dev/vdb | sha256sum") == whole


def expect_all_blocks(guest: Guest, file: Path) -> None:
    """Each block has the checksum that the guest remembers, for the guest and for the host."""
    guest.must("touch /tmp/stop; until [ -e /tmp/end.0 -a -e /tmp/end.1 ]; do usleep 50000; done")
    assert guest.must("cat /tmp/end.0 /tmp/end.1").split() == ["well", "well"]
    sums = guest.must(
        f"for w in 0 1; do n=0; while [ $n -lt {BLOCKS_EACH} ]; do"
        " cat /tmp/sums.$w/$n; n=$((n + 1)); done; done"
    )
    told = [line.split()[0] for line in sums.splitlines()]
    content = file.read_bytes()
    found = [
        hashlib.sha256(content[at : at + BLOCK]).hexdigest() for at in range(0, len(content), BLOCK)
    ]
    assert found == told
    number = random.randrange(len(told))
    read = guest.must(
        f"dd if=/dev/vda bs={BLOCK} skip={number} count=1 iflag=direct 2>/dev/null | sha256sum"
    )
    assert read.split()[0] == told[number]
