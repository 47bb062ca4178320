"""Polled completion where there is a disk with poll queues: in a guest of our own.

Few machines' disks have poll queues; the guest's kernel gives some to QEMU's NVMe. The guest sees
this machine's files, read-only, so that it runs this very build: polled_disk.py does the checks.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.system.processes import start
from drivebay.vm import initramfs
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.qemu import find_qemu

pytestmark = [pytest.mark.needs_qemu, pytest.mark.needs_root]

FILE_SERVER = "/usr/lib/qemu/virtiofsd"
CHECKS = Path(__file__).with_name("polled_disk.py")
GUEST_SECONDS = 200.0
SERVER_SECONDS = 20.0
MEMORY = "512M"
MODULES = ("virtio_pci", "virtiofs")

INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done < /modules/order
busybox mount -t virtiofs -o ro host /mnt
busybox mount --bind /dev /mnt/dev
busybox mount -t proc proc /mnt/proc
busybox mount -t sysfs sysfs /mnt/sys
busybox mkdir /mnt/dev/shm
busybox mount -t tmpfs shm /mnt/dev/shm
PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 busybox chroot /mnt {command}
echo "the checks ended with $?"
busybox poweroff -f
"""


@pytest.fixture
def initrd(guest_image: GuestImage, folder: Path) -> Path:
    command = shlex.join([sys.executable, str(CHECKS), "/dev/nvme0n1", "/mnt"])
    modules = initramfs.modules_in_loading_order(guest_image.modules, MODULES)
    init = INIT.format(command=command).encode()
    path = folder / "initrd"
    path.write_bytes(initramfs.pack(guest_image.busybox.read_bytes(), modules, {"/init": init}))
    return path


@pytest.fixture
def file_server(folder: Path, logs: Path) -> Iterator[Path]:
    """Serves this machine's files at a socket."""
    socket = folder / "files"
    words = [FILE_SERVER, f"--socket-path={socket}", "-o", "source=/"]
    words += ["-o", "cache=always", "-o", "sandbox=chroot"]
    child = start("virtiofsd", words, logs / "virtiofsd.log")
    deadline = time.monotonic() + SERVER_SECONDS
    while not socket.exists():
        assert not child.ended(), child.last_words()
        assert time.monotonic() < deadline, "virtiofsd made no socket"
        time.sleep(0.02)
    yield socket
    child.stop()


def test_a_disk_with_poll_queues_is_polled(
    guest_image: GuestImage, initrd: Path, file_server: Path, folder: Path
) -> None:
    """Right data and no interrupt, on the disk itself and in a file system on it."""
    disk = folder / "disk"
    with disk.open("wb") as file:
        os.truncate(file.fileno(), 64 << 20)
    words = [str(find_qemu().path), "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", "2"]
    words += ["-m", MEMORY, "-numa", "node,memdev=memory"]
    words += ["-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"]
    words += ["-no-reboot", "-serial", "stdio", "-kernel", str(guest_image.kernel)]
    words += ["-initrd", str(initrd)]
    words += ["-append", "console=ttyS0 quiet panic=-1 nvme.poll_queues=2"]
    words += ["-chardev", f"socket,id=files,path={file_server}"]
    words += ["-device", "vhost-user-fs-pci,chardev=files,tag=host"]
    words += ["-drive", f"if=none,id=disk,file={disk},format=raw"]
    words += ["-device", "nvme,serial=polled,drive=disk"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GUEST_SECONDS
    )
    assert "everything was polled" in done.stdout, done.stdout + done.stderr
    assert "the checks ended with 0" in done.stdout, done.stdout
