"""A domain of ours under a real libvirt: defined, started, and its disk is the target's.

This libvirt is the test's own: it sees empty folders where the system's has its state.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivebay.vm import initramfs
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.hardware import Disk, Hardware, Listener, Memory, Nic, Start
from drivebay.vm.kvm import Accelerator
from drivebay.vm.libvirt import domain_xml
from drivebay.vm.processes import Child, start
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import Forward
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


@pytest.fixture
def hardware(guest_image: GuestImage, target: TargetProcess, folder: Path) -> Hardware:
    """A tiny machine on a disk of the target; its forward is in QEMU's own words."""
    nobody = pwd.getpwnam("nobody").pw_uid
    (folder / "disk").write_bytes(bytes(8192 * 512))
    target.call("bdev_aio_create", name="Disk0", filename=str(folder / "disk"), block_size=512)
    target.call(
        "vhost_create_blk_controller", ctrlr="web-system", dev_name="Disk0", socket_uid=nobody
    )
    modules = initramfs.modules_in_loading_order(guest_image.modules, MODULES)
    initrd = initramfs.pack(guest_image.busybox.read_bytes(), modules, {"/init": INIT.encode()})
    (folder / "initrd").write_bytes(initrd)
    shutil.copy(guest_image.kernel, folder / "kernel")
    return Hardware(
        "web",
        Memory(192 << 10),
        Listener(folder / "monitor"),
        [("console", Listener(folder / "console", str(folder / "web.log")))],
        uuid="0f5b5f3e-9d46-4f4c-8a3e-0c5c6a1f7f11",
        machine=find_qemu().machine,
        disks=[Disk(target.controller_socket("web-system"), 2, name="system", boot_order=0)],
        nics=[Nic("52:54:00:12:34:56", [Forward(0, 22)])],
        start=Start(str(folder / "kernel"), str(folder / "initrd"), "console=ttyS0 quiet panic=-1"),
    )


def test_libvirt_starts_the_machine_on_our_disk(
    libvirt: Libvirt, hardware: Hardware, target: TargetProcess, folder: Path
) -> None:
    nobody = pwd.getpwnam("nobody")
    domain = domain_xml(
        find_qemu(), Accelerator("tcg", ""), hardware, (nobody.pw_uid, nobody.pw_gid)
    )
    file = folder / "web.xml"
    file.write_text(domain.xml)
    libvirt.virsh("define", str(file), "--validate")
    libvirt.virsh("start", "web")
    pid = (libvirt.root / "run/libvirt/qemu/web.pid").read_text()
    assert Path(f"/proc/{pid}").stat().st_uid == nobody.pw_uid
    log = folder / "web.log"
    deadline = time.monotonic() + GUEST_SECONDS
    while libvirt.virsh("domstate", "web") != "shut off":
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)
    assert "sectors=8192" in log.read_text(errors="replace")
    assert (folder / "disk").read_bytes().startswith(b"written by the domain\n")
