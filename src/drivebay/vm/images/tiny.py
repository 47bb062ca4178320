"""The tiny image: Debian's cloud kernel and busybox on a disk that boots, made in seconds.

Context: any process, as root or not. For trying things out and for tests: the guest gets an
address by DHCP and has a shell on its serial port, and that is all. Its root file system is
on the disk and writable, so what one clone writes another does not see; it switches itself
off when the machine's power button is pressed.

    firmware ─► GRUB ─► kernel ─► initramfs: drivers, root ─► busybox init: tiny-rc.sh, a shell
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from drivebay.vm.guest_image import GuestImage, guest_script, prepare_guest
from drivebay.vm.images.bootable import check_tools, grub_config, make_bootable, run_tool
from drivebay.vm.images.store import BuiltImage, ImageFacts

__all__ = ["UP", "build_tiny"]

UP: Final = "drivebay tiny guest is up"  # the console says so (tiny-rc.sh)

SIZE: Final = 64 << 20
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_net", "button",
                  "evdev", "virtiofs")  # fmt: skip
FOLDERS: Final = ("bin", "boot/grub", "dev", "etc/acpi/PWRF", "proc", "root", "sbin", "sys", "tmp")
FILES: Final = {
    "etc/hostname": "tiny\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/profile": "export PATH=/bin HOME=/root TERM=vt100 PS1='tiny# '\n",
    "etc/inittab": (
        "::sysinit:/etc/rc\n"
        "ttyS0::respawn:-/bin/sh\n"
        "::ctrlaltdel:/bin/reboot\n"
        "::shutdown:/bin/umount -a -r\n"
    ),
}
PROGRAMS: Final = {"etc/rc": "tiny-rc.sh", "etc/dhcp": "tiny-dhcp.sh"}
POWER_BUTTON: Final = "etc/acpi/PWRF/00000080"  # what acpid calls for it


def build_tiny(work: Path, say: Callable[[str], None]) -> BuiltImage:
    """Build it in the folder ``work``; a failure leaves nothing. Raises: NotFound, HostError."""
    check_tools()
    guest = prepare_guest(say)
    say(f"making a disk with Linux {guest.version}")
    root_uuid = str(uuid.uuid4())
    raw = work / "tiny.raw"
    try:
        with tempfile.TemporaryDirectory(dir=work) as name:
            _lay_out(Path(name), guest, root_uuid)
            make_bootable(Path(name), raw, SIZE, root_uuid)
    except BaseException:
        raw.unlink(missing_ok=True)
        raise
    day = time.strftime("%Y-%m-%d", time.gmtime())
    facts = ImageFacts(
        origin=f"built by drivebay: tiny, {day}",
        os=f"Linux {guest.version} and busybox",
        cloud_init=False,
    )
    return BuiltImage(raw, facts)


def _lay_out(root: Path, guest: GuestImage, root_uuid: str) -> None:
    """Put the guest's files below ``root``."""
    root.chmod(0o755)
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    shutil.copyfile(guest.kernel, root / "vmlinuz")
    scripts = {"/init": guest_script("tiny-init.sh")}
    (root / "initrd.img").write_bytes(guest.initrd(scripts, MODULES))
    # An emulated processor that has to share its core is too late for the kernel's test of the
    # timer, which then gives up.
    words = "rw no_timer_check quiet panic=5 console=ttyS0,115200"
    (root / "boot/grub/grub.cfg").write_text(grub_config("Tiny Linux", root_uuid, words))
    busybox = root / "bin/busybox"
    shutil.copyfile(guest.busybox, busybox)
    busybox.chmod(0o755)
    for applet in run_tool([str(busybox), "--list"]).decode().split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "sbin/init").symlink_to("../bin/busybox")
    for path, text in FILES.items():
        (root / path).write_text(text)
    for path, script in PROGRAMS.items():
        (root / path).write_bytes(guest_script(script))
        (root / path).chmod(0o755)
    (root / POWER_BUTTON).write_text("#!/bin/sh\nexec poweroff\n")
    (root / POWER_BUTTON).chmod(0o755)
