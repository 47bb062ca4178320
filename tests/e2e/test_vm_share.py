"""Folders of the host in a guest: both ways, read-only, missing, and without their virtiofsd.

The guest mounts its folders and then runs what it finds in one of them: that is how the host's
files come into the guest, and the guest's answers to the host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.vm import share_jail
from drivebay.vm.guest_image import MODULES, GuestImage
from drivebay.vm.virtiofsd import find_virtiofsd
from tests.e2e.newer_qemu import virtiofsd_in_rust
from tests.e2e.vm_bay import APPEND, VmBay
from tests.fakes.process import wait_until

pytestmark = pytest.mark.needs_qemu

ANSWER_SECONDS = 120
NOBODY = 65534
INIT = b"""#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module"
done < /modules/order
for tag in work only; do
    busybox mkdir -p "/$tag"
    busybox mount -t virtiofs "$tag" "/$tag"
done
while true; do
    if [ -e /work/do ]; then
        busybox mv /work/do /do
        . /do > /work/said 2>&1
        busybox mv /work/said /work/done
    fi
    busybox usleep 20000
done
"""


@dataclass(frozen=True)
class Shares:
    """A VM 's' that is off, its folder 'work' to write to, and 'only' to read."""

    bay: VmBay
    work: Path
    only: Path

    def ask(self, script: str) -> str:
        """Let the guest run a script; return what it said."""
        (self.work / "do.new").write_text(script)
        (self.work / "do.new").rename(self.work / "do")
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (self.work / "done").exists():
            assert time.monotonic() < deadline, self.bay.vm("log", "s")
            time.sleep(0.05)
        said = (self.work / "done").read_text()
        (self.work / "done").unlink()
        return said


@pytest.fixture(scope="module")
def shares(vm_bay: VmBay, guest_image: GuestImage) -> Shares:
    folder = vm_bay.folder
    work, only = folder / "a folder, with signs", folder / "only"
    for made in (work, only, only / "below"):
        made.mkdir()
    (only / "text").write_text("from the host\n")
    (folder / "kernel").write_bytes(guest_image.kernel.read_bytes())
    (folder / "initrd").write_bytes(guest_image.initrd({"/init": INIT}, [*MODULES, "virtiofs"]))
    vm_bay.start_target()
    vm_bay.vm(
        "create", "s", "--disk", "16M", "--memory", "128M", "--cpus", "1", "--net", "none",
        "--kernel", f"{folder}/kernel", "--initrd", f"{folder}/initrd", "--append", APPEND,
        "--share", f"{work}:work", "--share", f"{only},ro",
    )  # fmt: skip
    return Shares(vm_bay, work, only)


@pytest.fixture(params=["as installed", "in Rust"])
def running(
    request: pytest.FixtureRequest, shares: Shares, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shares]:
    """Served by each of the two programs that are called virtiofsd."""
    if request.param == "in Rust":
        monkeypatch.setenv("PATH", f"{virtiofsd_in_rust()}:{os.environ['PATH']}")
        assert find_virtiofsd("the test").in_rust
    shares.bay.vm("start", "s")
    yield shares
    shares.bay.vm("stop", "s", "--force")
    wait_until_none_serves(shares)


def servers(shares: Shares) -> list[int]:
    """The processes that serve this VM's folders and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            if "virtiofsd" in command and str(shares.bay.folder) in command:
                found.append(int(path.name))
    return sorted(found)


def wait_until_none_serves(shares: Shares) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while left := servers(shares):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_files_go_both_ways_and_what_is_read_only_stays(running: Shares) -> None:
    """A guest that mounts it writable is refused by the host."""
    content = os.urandom(3_000_000)
    (running.work / "data").write_bytes(content)
    said = running.ask(
        "cat /only/text; ls /only; cp /work/data /work/copy; mkdir /work/made\n"
        "echo x > /only/new; rm /only/text; mount -o remount,rw /only\n"
        "echo x > /only/new; echo x > /only/below/new; chmod 777 /only/text; ln -s a /only/link\n"
        "grep -c '/only virtiofs rw' /proc/mounts; mknod /work/null c 1 3\n"
    )
    assert said.startswith("from the host\nbelow\ntext\n")
    assert said.count("Read-only file system") == 6, said
    assert "\n1\n" in said, "the guest believes that it may write"
    assert "mknod: /work/null: Operation not permitted" in said
    assert (running.work / "copy").read_bytes() == content
    assert (running.work / "copy").stat().st_uid == os.geteuid()
    assert sorted(path.name for path in running.only.iterdir()) == ["below", "text"]
    assert list((running.only / "below").iterdir()) == []
    (running.work / "made").rmdir()
    # Nobody else may connect, and nothing of it lies about.
    folder = running.bay.vm_folder("s")
    assert sorted(path.name for path in folder.glob("share*") if ".1" not in path.name) == [
        "share-only.log", "share-work.log",
    ]  # fmt: skip
    _disks_go_on_without_virtiofsd(running)


def _disks_go_on_without_virtiofsd(running: Shares) -> None:
    """Last, since the guest loses its ear."""
    write = "dd if=/dev/urandom of=/dev/vda bs=64k count=1 conv=fsync"
    running.ask(
        f"(while {write}; do echo wrote > /dev/ttyS0; usleep 50000; done) > /dev/null 2>&1 &\n"
    )
    for pid in servers(running):
        os.kill(pid, signal.SIGKILL)
    wait_until_none_serves(running)
    before = running.bay.vm("log", "s").count("wrote")
    wait_until(
        lambda: running.bay.vm("log", "s").count("wrote") >= before + 3,
        "three more writes",
        ANSWER_SECONDS,
    )


def test_a_folder_that_is_gone_and_one_that_cannot_be_shared(
    shares: Shares, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares.only.rename(shares.only.with_name("away"))
    try:
        said = shares.bay.refused("vm", "start", "s")
    finally:
        shares.only.with_name("away").rename(shares.only)
    assert f"the folder '{shares.only}' of VM 's' is not there" in said
    broken = tmp_path / "virtiofsd"
    broken.write_text("#!/bin/sh\necho virtiofsd has no luck\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = shares.bay.refused("vm", "start", "s")
    assert "can't be shared with VM 's': virtiofsd said: virtiofsd has no luck" in said
    assert shares.bay.info("s")["state"] == "off"
    assert servers(shares) == []


@pytest.mark.parametrize("name", ["as installed", "in Rust"])
def test_who_is_not_root_has_the_sandbox_too(
    shares: Shares, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the program that VMs use, as the user nobody if we are root."""
    if name == "in Rust":
        monkeypatch.setenv("PATH", f"{virtiofsd_in_rust()}:{os.environ['PATH']}")
    program = find_virtiofsd("the test")
    shares.only.chmod(0o755)
    identity = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(shares.bay.folder / "s"))
    listening.listen(1)
    descriptor = listening.fileno()
    jail = Path(share_jail.__file__).read_text()
    process = subprocess.Popen(
        ["setpriv", *(identity if os.geteuid() == 0 else []), "--no-new-privs", "/usr/bin/python3",
         "-I", "-S", "-c", jail, "ro", str(shares.only),
         *program.command(str(shares.only), descriptor, 1024)],
        pass_fds=[descriptor],
    )  # fmt: skip
    with process, listening, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(listening.getsockname())
        (shares.bay.folder / "s").unlink()
        connection.sendall(struct.pack("<III", 1, 1, 0))
        assert connection.recv(1) == b"\x01"
        pids = [pid for pid in servers(shares) if Path(f"/proc/{pid}/status").exists()]
        (inner,) = [pid for pid in pids if "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()]
        status = Path(f"/proc/{inner}/status").read_text()
        assert f"Uid:\t{NOBODY if os.geteuid() == 0 else os.geteuid()}\t" in status
        assert not Path(f"/proc/{inner}/ns/user").samefile("/proc/self/ns/user")
        mounts = Path(f"/proc/{inner}/mountinfo").read_text().splitlines()
        assert [line.split()[5].split(",")[0] for line in mounts if line.split()[4] == "/"] == [
            "ro"
        ]
        process.terminate()
