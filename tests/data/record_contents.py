"""Record what tools write to disks: the parts of `disk_contents.json.xz` that are looked at.

Run by hand, as root, with the tools below installed (xfsprogs btrfs-progs ntfs-3g dosfstools
exfatprogs f2fs-tools jfsutils reiserfsprogs erofs-utils squashfs-tools xorriso bcache-tools
lvm2 cryptsetup-bin qemu-utils fdisk); the recording is made anew when a format is added:

    python tests/data/record_contents.py FOLDER-OF-SPDK-IMAGES

Kept of each image: its size, what blkid says of it, and the bytes that the search reads.
"""

from __future__ import annotations

import base64
import json
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from drivebay.disks.contents import find_contents

HERE = Path(__file__).parent
PIECE = 64

# name: (size for truncate, or empty; the command, in which F is the image)
IMAGES = {
    "ext2": ("16M", "mkfs.ext2 -q -L old F"),
    "ext3": ("16M", "mkfs.ext3 -q -L journal F"),
    "ext4": ("64M", "mkfs.ext4 -q -L backup F"),
    "ext4 4k": ("64M", "mkfs.ext4 -q -b 4096 -O ^64bit -L four F"),
    "xfs": ("320M", "mkfs.xfs -q -L archive F"),
    "btrfs": ("128M", "mkfs.btrfs -q -L pictures F"),
    "ntfs": ("16M", "mkntfs -q -F -f -L Windows F"),
    "fat12": ("1440K", "mkfs.fat -n BOOT F"),
    "fat16": ("32M", "mkfs.fat -F16 F"),
    "fat32": ("64M", "mkfs.fat -F32 -n EFI F"),
    "exfat": ("32M", "mkfs.exfat -L CAMERA F"),
    "f2fs": ("64M", "mkfs.f2fs -q -l phone F"),
    "jfs": ("48M", "mkfs.jfs -q -L files F"),
    "reiserfs": ("64M", "mkreiserfs -q -ff -l mail F"),
    "swap": ("8M", "mkswap -L swapspace F"),
    "squashfs": ("", "rm F; mksquashfs D F -quiet -no-progress"),
    "erofs": ("", "mkfs.erofs --quiet F D"),
    "iso9660": ("", "rm F; xorriso -as mkisofs -quiet -V INSTALL -o F D"),
    "bcache": ("32M", "make-bcache -B F"),
    "luks1": ("", "qemu-img create -q -f luks --object secret,id=s,data=abc -o key-secret=s F 8M"),
    "luks2": (
        "32M",
        (
            "echo -n abc | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 "
            "--pbkdf-force-iterations 1000 --label vault F -"
        ),
    ),
    "lvm": (
        "32M",
        (
            "L=$(losetup -f --show F); pvcreate -qq --devices $L $L && "
            "vgcreate -qq --devices $L vg_data $L; losetup -d $L"
        ),
    ),
    "mbr": ("16M", "printf 'label: dos\\n,4M,83\\n,,7\\n' | sfdisk -q F"),
    "gpt": ("16M", "printf 'label: gpt\\nsize=4M,name=root\\nsize=2M\\n' | sfdisk -q F"),
    "gpt 4k": (
        "16M",
        (
            "L=$(losetup -f --show -b 4096 F); printf 'label: gpt\\n,\\n' | sfdisk -q $L; "
            "losetup -d $L"
        ),
    ),
    "gpt without its head": (
        "16M",
        (
            "printf 'label: gpt\\nsize=4M\\n' | sfdisk -q F; dd if=/dev/zero of=F bs=1k count=16 "
            "conv=notrunc status=none"
        ),
    ),
    "qcow2": ("", "qemu-img create -q -f qcow2 F 1G"),
    "vmdk": ("", "qemu-img create -q -f vmdk F 1G"),
    "vhdx": ("", "qemu-img create -q -f vhdx F 1G"),
    "vpc": ("", "qemu-img create -q -f vpc F 64M"),
    "vpc fixed": ("", "qemu-img create -q -f vpc -o subformat=fixed F 8M"),
    "vdi": ("", "qemu-img create -q -f vdi F 1G"),
    "zeroes": ("1M", ":"),
    "noise": ("", "head -c 64K /dev/urandom > F"),
}


def record(path: Path) -> dict[str, Any]:
    """What the search reads of an image, and what it says."""
    size = path.stat().st_size
    pieces: dict[str, str] = {}
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            for start in range(offset // PIECE * PIECE, offset + length, PIECE):
                piece = os.pread(file.fileno(), PIECE, start)
                if any(piece):
                    pieces[str(start)] = base64.b64encode(piece).decode()
            return os.pread(file.fileno(), length, offset)

        found = [str(content) for content in find_contents(read, size)]
    blkid = subprocess.run(
        ["blkid", "-p", "-o", "export", str(path)], capture_output=True, text=True
    )
    kept = ("TYPE", "LABEL", "PTTYPE")
    said = dict(line.split("=", 1) for line in blkid.stdout.splitlines() if "=" in line)
    oracle = {key: said[key] for key in kept if key in said}
    return {"size": size, "found": found, "blkid": oracle, "pieces": pieces}


def main(spdk_images: Path) -> None:
    """Make all images in a scratch folder and write the recording."""
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "D").mkdir()
        (folder / "D" / "file").write_text("hello\n")
        for name, (size, command) in IMAGES.items():
            image = folder / "F"
            image.unlink(missing_ok=True)
            subprocess.run(["truncate", "-s", size or "0", image], check=True)
            subprocess.run(command, shell=True, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            recorded[name] = record(image)
        for path in sorted(spdk_images.glob("*.img.xz")):
            image = folder / "F"
            image.write_bytes(lzma.decompress(path.read_bytes()))
            recorded[path.name.removesuffix(".img.xz")] = record(image)
    text = json.dumps(recorded, indent=1).encode()
    (HERE / "disk_contents.json.xz").write_bytes(lzma.compress(text, preset=9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
