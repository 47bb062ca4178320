"""Snapshots of a VM that writes, the way back, and a VM that goes through a file: real guests of
the tiny image.

The guest writes generations: number N first to its raw second disk, then a file of random data
with its checksum, then the number to its first disk, each of them synced. So at any instant the
second disk is at the number of the first or one ahead, and the file is as its checksum says.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pexpect
import pytest

from drivebay.vm import exporting
from drivebay.vm.images.tiny import UP
from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = "600"
WRITER = b"""
n=$(cat /root/number 2> /dev/null || echo 0)
while n=$((n + 1)); do
  echo $n | dd of=/dev/vdb bs=512 conv=sync,fsync
  dd if=/dev/urandom of=/root/file-$((n % 2)) bs=1k count=64
  md5sum /root/file-$((n % 2)) > /root/sum-$((n % 2)); sync
  echo $n > /root/number; sync
  usleep 100000
done
"""
# /tmp is empty after each start.
WRITE = (
    f"[ -e /tmp/w ] || {{ echo {base64.b64encode(WRITER).decode()} | base64 -d > /tmp/w; "
    "sh /tmp/w > /dev/null 2>&1 & }; echo begun"
)
NUMBER = "until [ -e /root/number ]; do usleep 10000; done; cat /root/number"
CHECK = "md5sum -c /root/sum-$(($(cat /root/number) % 2)) | sed 's/.*: //'"
SECOND = "dd if=/dev/vdb bs=512 count=1 2> /dev/null | tr -d '\\0'"
TRIES = 4
ANSWER_SECONDS = 30


class Console:
    """The console of a VM, at its prompt."""

    def __init__(self, name: str) -> None:
        self._process: pexpect.spawn[str] = pexpect.spawn(
            sys.executable, ["-m", "drivebay", "vm", "console", name], encoding="utf-8", timeout=60
        )
        self._process.expect("tiny#")
        self._asked = 0

    def ask(self, command: str) -> str:
        """What a command prints, one word. A shell that is slow may lose what is typed early."""
        for _ in range(TRIES):
            self._asked += 1
            self._process.sendline(f'echo "answer {self._asked} $({command}) e""nd"')
            with contextlib.suppress(pexpect.TIMEOUT):
                self._process.expect(rf"answer {self._asked} (\S*) end", timeout=ANSWER_SECONDS)
                found = self._process.match
                assert isinstance(found, re.Match)
                return str(found[1])
        raise AssertionError(f"no answer to {command!r}: {self._process.before!r}")

    def write(self) -> None:
        """Begin to write generations, or go on."""
        assert self.ask(WRITE) == "begun"

    def generation(self) -> int:
        return int(self.ask(NUMBER))

    def check(self) -> int:
        """The generation of a guest that does not write now; all is as it was written."""
        first = self.generation()
        assert self.ask(CHECK) == "OK"
        assert int(self.ask(SECOND)) - first in (0, 1), "both disks are of one instant"
        return first

    def wait_for(self, generation: int) -> None:
        deadline = time.monotonic() + 300
        while self.generation() < generation:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def close(self) -> None:
        self._process.close(force=True)


@pytest.fixture(scope="module")
def bay(vm_bay: VmBay) -> Iterator[VmBay]:
    """At the end nothing is left of what was made."""
    vm_bay.start_target()
    vm_bay.ok("image", "build", "tiny")
    yield vm_bay
    for entry in vm_bay.json("vm", "list"):
        vm_bay.vm("delete", entry["name"], "--force", "--yes")
    assert vm_bay.disks() == []
    assert vm_bay.controllers() == []
    assert exports_in(vm_bay) == []


@pytest.fixture(scope="module")
def writer(bay: VmBay) -> str:
    """A VM that runs; each test goes on where the one before it has left it."""
    bay.vm(
        "create", "t", "--image", "tiny", "--memory", "96M", "--cpus", "1", "--disk", "64M",
        "--disk", "16M,name=raw", "--start",
    )  # fmt: skip
    return "t"


@pytest.fixture
def console(bay: VmBay, writer: str) -> Iterator[Console]:
    """Of a guest that writes."""
    console = up(bay, writer)
    console.write()
    yield console
    console.close()


def exports_in(bay: VmBay) -> list[str]:
    """What exports have in the target: their snapshots, and bdevs on their files."""
    shown = json.loads(bay.ok("rpc", "bdev_get_bdevs"))
    names = [name for bdev in shown for name in (bdev["name"], *bdev["aliases"])]
    return [name for name in names if "export-" in name]


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


def test_a_vm_that_writes_goes_through_a_file_and_boots_again(bay: VmBay, console: Console) -> None:
    begun = console.generation()
    console.wait_for(begun + 2)
    bay.vm("snapshot", "t", "before", "--delete", "--yes")  # under a guest that writes
    file = bay.folder / "t.qcow2"
    said = bay.vm("export", "t", str(file))
    assert "as after a power cut" in said
    assert "not in it: raw" in said
    assert exports_in(bay) == []
    written = console.generation()
    bay.vm("stop", "t", "--force")
    words = said.partition("drivebay vm import t.qcow2 NEW ")[2].split()
    bay.vm("import", str(file), "u", *words, "--start")
    again = up(bay, "u")
    assert begun + 2 <= again.generation() <= written
    assert again.ask(CHECK) == "OK"
    again.close()
    bay.vm("delete", "u", "--force", "--yes")
    bay.ok("image", "delete", "u", "--yes")


# ---- exports that fail --------------------------------------------------------------------------


@pytest.fixture
def large(bay: VmBay) -> Iterator[str]:
    """A VM that is off, whose disk takes a target seconds to copy."""
    bay.ok("disk", "create", "large", "--size", "512M", "--thick")
    bay.vm("create", "l", "--kernel", "/dev/null", "--disk", "bdev=large", "--memory", "64M")
    yield "l"
    bay.vm("delete", "l", "--yes")
    bay.ok("disk", "delete", "large", "--yes")


def test_a_full_file_system_has_no_half_file_and_the_target_nothing(
    bay: VmBay, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    small = bay.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", small], check=True)
    try:
        said = bay.refused("vm", "export", large, str(small / "l.qcow2"))
        assert "32 MiB are left" in said
        monkeypatch.setattr(exporting, "free_bytes", lambda path: 1 << 40)
        said = bay.refused("vm", "export", large, str(small / "l.qcow2"))
        assert "No space left on device" in said
        assert list(small.iterdir()) == []
        assert exports_in(bay) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_one_that_is_ended_leaves_nothing_and_a_killed_ones_rest_goes_with_the_next(
    bay: VmBay, large: str
) -> None:
    folder = bay.folder / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "drivebay", "vm", "export", large, str(folder / "l.raw")]
    for number, left in ((signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, True)):
        process = subprocess.Popen(command, preexec_fn=listen_to_ctrl_c)
        deadline = time.monotonic() + 300
        while len(exports_in(bay)) < 2:  # its snapshot, and the bdev into which that is copied
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(number)
        assert process.wait(60) != 0
        assert not (folder / "l.raw").exists()
        assert bool(list(folder.iterdir())) == bool(exports_in(bay)) == left
    bay.vm("export", large, str(folder / "l.raw"))
    assert [path.name for path in folder.iterdir()] == ["l.raw"]
    assert exports_in(bay) == []


def listen_to_ctrl_c() -> None:
    """A shell's background jobs ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
