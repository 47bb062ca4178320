"""A VM of ours under a real libvirt: defined, started, and its disk is the target's.

This libvirt is the test's own: it sees empty folders where the system's has its state.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.system.processes import Child, start
from drivebay.vm import initramfs
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.qmp import Qmp
from drivebay.vm.target import TargetProcess

pytestmark = [pytest.mark.needs_qemu, pytest.mark.needs_root]

START_SECONDS = 30.0
GUEST_SECONDS = 120.0
MODULES = ("virtio_pci", "virtio_blk")
OWN_FOLDERS = ("/run", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt")

INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done < /modules/order
echo "sectors=$(busybox cat /sys/block/vda/size)"
echo "written by the domain" | busybox dd of=/dev/vda bs=4096 count=1 conv=sync,fsync 2>&1
busybox poweroff -f
"""


@dataclass(frozen=True)
class Libvirt:
    """Two daemons in a mount namespace of their own, where virsh is run, too."""

    daemon: Child

    @property
    def root(self) -> Path:
        """Its file system, as seen from here."""
        return Path(f"/proc/{self.daemon.process.pid}/root")

    def virsh(self, *words: str) -> str:
        command = ["nsenter", f"--mount=/proc/{self.daemon.process.pid}/ns/mnt"]
        done = subprocess.run(
            [*command, "virsh", "-c", "qemu:///system", *words],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def libvirt(folder: Path, logs: Path) -> Iterator[Libvirt]:
    mounts = " && ".join(f"mount -t tmpfs -o mode=755 own {each}" for each in OWN_FOLDERS)
    script = f"{mounts} && virtlogd -d && exec libvirtd"
    words = ["unshare", "--mount", "--propagation=private", "sh", "-c", script]
    daemon = start("libvirtd", words, logs / "libvirtd.log")
    found = Libvirt(daemon)
    pid_file = found.root / "run/virtlogd.pid"
    try:
        _wait_for_answer(found)
        yield found
    finally:
        log_daemon = int(pid_file.read_text()) if pid_file.exists() else None
        with contextlib.suppress(AssertionError):  # a machine that has ended, as it should
            found.virsh("destroy", "web")
        daemon.stop()
        if log_daemon is not None:
            os.kill(log_daemon, signal.SIGTERM)


def _wait_for_answer(libvirt: Libvirt) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert not libvirt.daemon.ended(), libvirt.daemon.last_words()
        try:
            libvirt.virsh("version")
        except AssertionError:
            assert time.monotonic() < deadline, libvirt.daemon.last_words()
            time.sleep(0.1)
        else:
            return


@dataclass(frozen=True)
class Web:
    """A VM of ours, made and started once by the commands that people use."""

    folder: Path
    target: TargetProcess

    def drivebay(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "drivebay", *words],
            env={**os.environ, "XDG_DATA_HOME": str(self.folder / "data")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def vm(self, verb: str, *words: str) -> str:
        return self.drivebay("vm", verb, "web", "-s", str(self.target.rpc_socket), *words)

    @property
    def home(self) -> Path:
        return self.folder / "data/drivebay/vms/web"


@pytest.fixture(scope="module")
def web(guest_image: GuestImage, target: TargetProcess, folder: Path) -> Iterator[Web]:
    """Its forward is nothing that libvirt's user network can do."""
    modules = initramfs.modules_in_loading_order(guest_image.modules, MODULES)
    initrd = initramfs.pack(guest_image.busybox.read_bytes(), modules, {"/init": INIT.encode()})
    (folder / "initrd").write_bytes(initrd)
    shutil.copy(guest_image.kernel, folder / "kernel")
    web = Web(folder, target)
    (folder / "disk").write_bytes(bytes(4 << 20))
    target.call("bdev_aio_create", name="Disk0", filename=str(folder / "disk"), block_size=512)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    boot = ["--kernel", str(folder / "kernel"), "--initrd", str(folder / "initrd")]
    boot += ["--append", "console=ttyS0 quiet panic=-1", "--memory", "192M", "--cpus", "1"]
    web.vm("create", *boot, "--disk", "bdev=Disk0", "--forward", f"{port}:22")
    yield web
    web.vm("stop", "--force")


def test_vcpus_keep_off_the_targets_core(web: Web) -> None:
    """With one core on this machine there is none beside the target's."""
    web.vm("start")
    with Qmp(web.home / "monitor.sock") as monitor:
        threads = [entry["thread-id"] for entry in monitor.call("query-cpus-fast")]
    cores = os.sched_getaffinity(0)
    others = cores - {min(cores)}  # the target's is the first
    assert [os.sched_getaffinity(thread) for thread in threads] == [others or cores]
    web.vm("stop", "--force")


def test_libvirt_starts_the_machine_on_our_disk(libvirt: Libvirt, web: Web) -> None:
    nobody = pwd.getpwnam("nobody")
    file = web.folder / "web.xml"
    file.write_text(web.vm("libvirt-xml"))
    libvirt.virsh("define", str(file), "--validate")
    (web.folder / "disk").write_bytes(bytes(4 << 20))
    libvirt.virsh("start", "web")
    pid = (libvirt.root / "run/libvirt/qemu/web.pid").read_text()
    assert Path(f"/proc/{pid}").stat().st_uid == nobody.pw_uid
    log = web.home / "console.log"
    deadline = time.monotonic() + GUEST_SECONDS
    while libvirt.virsh("domstate", "web") != "shut off":
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)
    assert "sectors=8192" in log.read_text(errors="replace")
    assert (web.folder / "disk").read_bytes().startswith(b"written by the domain\n")
