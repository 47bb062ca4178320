"""A guest writes files to its disk while the target is killed and started, again and again.

QEMU reconnects by itself; the guest must not see an error, and what it wrote must be right
in its own eyes and in the host's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivebay.vm.hardware import Disk
from drivebay.vm.machine import Machine
from tests.fakes.process import TargetProcess, wait_until

pytestmark = pytest.mark.needs_qemu

KILLS = 5
DISK_BYTES = 128 << 20
QUEUES = 2

# Three write files, force them to the disk and remember their sums, until /tmp/stop is there:
# requests of several are in flight, and complete in any order.
WRITERS = """
mount -t ext4 /dev/vda /mnt || exit 1
write_files() {
    number=0
    while [ ! -e /tmp/stop ]; do
        name=$1.$((number % 32))
        dd if=/dev/urandom of=/tmp/data.$1 bs=16k count=$((1 + number % 8)) 2> /dev/null
        dd if=/tmp/data.$1 of=/mnt/$name bs=16k conv=fsync 2> /dev/null ||
            { echo "file $name" > /tmp/failed; break; }
        sum=$(sha256sum < /tmp/data.$1)
        echo "${sum%% *}  /mnt/$name" > /tmp/sum.$name
        number=$((number + 1))
        echo $number > /tmp/written.$1
    done
    touch /tmp/stopped.$1
}
for writer in 1 2 3; do
    write_files $writer > /dev/null 2>&1 < /dev/null &
done
"""
# From the disk itself: the page cache went with the mount.
CHECK = """
touch /tmp/stop
n=0
until [ -e /tmp/stopped.1 -a -e /tmp/stopped.2 -a -e /tmp/stopped.3 ]; do
    n=$((n + 1)); [ $n -lt 600 ] || exit 1; usleep 100000
done
[ ! -e /tmp/failed ] || { cat /tmp/failed; exit 2; }
umount /mnt && mount -t ext4 /dev/vda /mnt && cat /tmp/sum.* | sha256sum -c && umount /mnt
"""


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found, f"{name} is missing: install e2fsprogs"
    return found


class Service:
    """A target that comes back from its file; QEMU's own user may connect to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run([tool("mke2fs"), "-q", "-t", "ext4", self.image], check=True)
        self.target = self._start()
        self.target.rpc("bdev_aio_create", name="F0", filename=str(self.image), block_size=512)
        self.socket = self.target.controller("c0", "F0")

    def _start(self) -> TargetProcess:
        config = self.folder / "target.json"
        words = ["-c", str(config), "--autosave", "--socket-mode", "0666"]
        return TargetProcess(self.folder, *words)

    def kill_and_start(self) -> None:
        self.target.kill()
        self.target = self._start()


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    service = Service(folder)
    yield service
    assert service.target.stop() == 0


def test_a_guest_does_not_notice(
    service: Service, boot_guest: Callable[[str, list[Disk]], Machine]
) -> None:
    machine = boot_guest("guest", [Disk(service.socket, QUEUES)])
    machine.wait_ready()

    def must(script: str) -> str:
        done = machine.run(script, 120)
        assert done.code == 0, f"{script}: code {done.code}: {done.text}"
        return done.text.strip()

    def written() -> int:
        return sum(int(word) for word in must("cat /tmp/written.* 2>/dev/null || true").split())

    def wait_for_more() -> None:
        before = written()
        wait_until(lambda: written() > before + 6, "files that the guest writes", 60)

    must(WRITERS)
    for _ in range(KILLS):
        wait_for_more()
        service.kill_and_start()
    wait_for_more()
    maps = Path(f"/proc/{service.target.pid}/maps").read_text()
    assert "inflight" in maps, "the last target was given no inflight region"
    checked = must(CHECK)
    assert checked.count(": OK") > KILLS
    assert "FAILED" not in checked
    must("! dmesg | grep -i 'i/o error'")
    machine.power_off()
    done = subprocess.run(
        [tool("e2fsck"), "-f", "-n", service.image], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
