"""An installer on an ISO that asks nothing: it writes an image to the first disk, and reboots.

Debian's cloud kernel, which it starts, has no driver for a CD drive: so the image is in its
initrd. Kernel and initrd lie where Debian's installer has them.
"""

from __future__ import annotations

import gzip
import tempfile
import uuid
from pathlib import Path
from typing import Final

from drivebay.vm.guest_image import GuestImage
from drivebay.vm.images.bootable import make_bootable
from tests.e2e.bootable_iso import write_iso

WRITES: Final = "the tiny installer writes to /dev/vda"  # the console says so
DONE: Final = "the tiny installer is done"
MENU: Final = "started from the installed disk"
KERNEL: Final = "/install.amd/vmlinuz"
INITRD: Final = "/install.amd/initrd.gz"
# Many guests on few cores are too late for the kernel's test of its timer.
WORDS: Final = "console=ttyS0 quiet no_timer_check panic=-1"
INIT: Final = f"""\
#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module"
done < /modules/order
until [ -b /dev/vda ]; do
    busybox usleep 10000
done
echo "{WRITES}"
busybox zcat /image.gz | busybox dd of=/dev/vda bs=1M conv=fsync 2> /dev/null &&
    echo "{DONE}"
busybox reboot -f
"""
GRUB_CONFIG: Final = f"""\
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=-1
menuentry '{MENU}' {{
    true
}}
"""
MENU_BYTES: Final = 16 << 20


def write_installer(path: Path, guest: GuestImage, image: Path) -> None:
    """Write an ISO that installs the raw ``image``."""
    scripts = {"/init": INIT.encode(), "/image.gz": gzip.compress(image.read_bytes(), 6)}
    files: dict[str, Path | bytes] = {KERNEL: guest.kernel, INITRD: guest.initrd(scripts)}
    write_iso(path, "TINY", files, KERNEL, INITRD, WORDS)


def make_menu(raw: Path) -> None:
    """Make an image that either firmware starts in a second: GRUB, and its menu is all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "boot/grub"
        folder.mkdir(parents=True)
        (folder / "grub.cfg").write_text(GRUB_CONFIG)
        make_bootable(Path(name), raw, MENU_BYTES, str(uuid.uuid4()))
