"""Snapshots of a VM that writes, the way back, and a VM that goes through a file: real guests of
the tiny image.

The guest writes generations: number N first to its raw second disk, then a file of random data
with its checksum, then the number to its first disk, each of them synced. So at any instant the
second disk is at the number of the first or one ahead, and the file is as its checksum says.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator

import pexpect
import pytest

from drivebay.vm.images.tiny import UP
from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = "600"
WRITER = """cat > /root/writer <<'E'
n=$(cat /root/number 2> /dev/null || echo 0)
while n=$((n + 1)); do
  echo $n | dd of=/dev/vdb bs=512 conv=sync,fsync 2> /dev/null
  dd if=/dev/urandom of=/root/file-$((n % 2)) bs=1k count=64 2> /dev/null
  md5sum /root/file-$((n % 2)) > /root/sum-$((n % 2)); sync
  echo $n > /root/number; sync
  usleep 100000
done
E
"""
NUMBER = (
    """until [ -e /root/number ]; do usleep 10000; done; echo "at $(cat /root/number) e""nd" """
)
CHECK = """md5sum -c /root/sum-$(($(cat /root/number) % 2)); """
SECOND = """echo "second $(dd if=/dev/vdb bs=512 count=1 2> /dev/null | tr -d '\\0') e""nd" """


class Console:
    """The console of a VM, at its prompt."""

    def __init__(self, name: str) -> None:
        self._process: pexpect.spawn[str] = pexpect.spawn(
            sys.executable, ["-m", "drivebay", "vm", "console", name], encoding="utf-8", timeout=60
        )
        self._process.expect("tiny#")

    def write(self) -> None:
        """Begin to write generations, or go on."""
        self._process.sendline(f"{WRITER}sh /root/writer &")

    def ask(self, command: str, answer: str) -> str:
        self._process.sendline(command)
        self._process.expect(answer)
        found = self._process.match
        assert isinstance(found, re.Match)
        return str(found[1])

    def generation(self) -> int:
        return int(self.ask(NUMBER, r"at (\d+) end"))

    def check(self) -> int:
        """The generation of a guest that does not write now; all is as it was written."""
        first = self.generation()
        assert self.ask(CHECK, r"file-\d: (OK|FAILED)") == "OK"
        second = int(self.ask(SECOND, r"second (\d+) end"))
        assert second - first in (0, 1), "both disks are of one instant"
        return first

    def wait_for(self, generation: int) -> None:
        deadline = time.monotonic() + 60
        while self.generation() < generation:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def close(self) -> None:
        self._process.close(force=True)


@pytest.fixture(scope="module")
def bay(vm_bay: VmBay) -> VmBay:
    vm_bay.start_target()
    vm_bay.ok("image", "build", "tiny")
    return vm_bay


@pytest.fixture
def console(bay: VmBay) -> Iterator[Console]:
    """That of a VM 't' that writes."""
    bay.vm(
        "create", "t", "--image", "tiny", "--memory", "96M", "--cpus", "1", "--disk", "64M",
        "--disk", "16M,name=raw", "--start",
    )  # fmt: skip
    console = up(bay, "t")
    console.write()
    yield console
    console.close()
    for entry in bay.json("vm", "list"):
        bay.vm("delete", entry["name"], "--force", "--yes")
    assert bay.disks() == []
    assert bay.controllers() == []


def up(bay: VmBay, name: str) -> Console:
    bay.vm("wait", name, "--for", "console", UP, "--timeout", BOOT_SECONDS)
    return Console(name)


def test_a_snapshot_under_writing_is_gone_back_to(bay: VmBay, console: Console) -> None:
    console.wait_for(3)
    assert "as after a power cut" in bay.vm("snapshot", "t", "before")
    taken = console.generation()
    console.wait_for(taken + 3)
    assert "its disks can't change under it" in bay.refused("vm", "revert", "t", "before", "--yes")
    bay.vm("stop", "t", "--force")
    bay.vm("revert", "t", "before", "--yes")
    bay.vm("start", "t")
    again = up(bay, "t")
    assert 3 <= again.check() <= taken
    again.close()
