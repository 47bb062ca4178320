"""What disks hold is told by real disks: a recording of what the usual tools write.

tests/data/record_contents.py made it, and says which tool each image is from.
"""

from __future__ import annotations

import base64
import json
import lzma
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivebay.disks.contents import Content, find_contents

RECORDED: dict[str, Any] = json.loads(
    lzma.decompress((Path(__file__).parents[1] / "data" / "disk_contents.json.xz").read_bytes())
)


class Image:
    """The recorded bytes of an image; all others are zeroes."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.size: int = record["size"]
        self.pieces = {
            int(offset): base64.b64decode(text) for offset, text in record["pieces"].items()
        }

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0, "a read before the beginning"
        assert offset + length <= self.size, "a read behind the end"
        buffer = bytearray(length)
        for start, piece in self.pieces.items():
            first, last = max(start, offset), min(start + len(piece), offset + length)
            if first < last:
                buffer[first - offset : last - offset] = piece[first - start : last - start]
        return bytes(buffer)


def found(name: str) -> list[str]:
    image = Image(RECORDED[name])
    return [str(content) for content in find_contents(image.read, image.size)]


WHAT = {
    "ext2": ['ext2 "old", 16 MiB'],
    "ext3": ['ext3 "journal", 16 MiB'],
    "ext4": ['ext4 "backup", 64 MiB'],
    "ext4 4k": ['ext4 "four", 64 MiB'],
    "xfs": ['XFS "archive", 320 MiB'],
    "btrfs": ['btrfs "pictures", 128 MiB'],
    "ntfs": ['NTFS "Windows", 16 MiB'],
    "fat12": ['FAT12 "BOOT", 1.4 MiB'],
    "fat16": ["FAT16, 32 MiB"],
    "fat32": ['FAT32 "EFI", 64 MiB'],
    "exfat": ["exFAT, 32 MiB"],
    "f2fs": ['F2FS "phone", 64 MiB'],
    "jfs": ['JFS "files"'],
    "reiserfs": ['ReiserFS "mail"'],
    "swap": ['swap "swapspace", 8 MiB'],
    "squashfs": ["SquashFS, 231 bytes"],
    "erofs": ["EROFS"],
    "iso9660": ['ISO 9660 "INSTALL", 368 KiB'],
    "bcache": ["bcache device"],
    "luks1": ["LUKS1 encrypted volume"],
    "luks2": ['LUKS2 encrypted volume "vault"'],
    "lvm": ['LVM physical volume "vg_data", 32 MiB'],
    "mbr": ["MBR partition table, 2 partitions"],
    "gpt": ["GPT partition table, 2 partitions"],
    "gpt 4k": ["GPT partition table, 1 partition"],
    "gpt without its head": ["GPT partition table, damaged"],
    "qcow2": ["qcow2 image, 1 GiB"],
    "vmdk": ["VMDK image"],
    "vhdx": ["VHDX image"],
    "vpc": ["VHD image"],
    "vpc fixed": ["VHD image"],
    "vdi": ["VDI image"],
    "raid-m0": ['SPDK RAID member "md1"'],
    "raid-m1": ['SPDK RAID member "md1"'],
    "spdk-lvs-clean": ['pool "lvs0", 96 MiB'],
    "spdk-lvs-crashed": ['pool "lvs0", 96 MiB'],
    "zeroes": [],
    "noise": [],
}


def test_every_recorded_image_is_expected() -> None:
    assert set(WHAT) == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_what_tools_write_is_recognized(name: str) -> None:
    assert found(name) == WHAT[name]


@pytest.mark.parametrize("name", [name for name in RECORDED if RECORDED[name]["blkid"]])
def test_blkid_sees_the_same_label(name: str) -> None:
    label = RECORDED[name]["blkid"].get("LABEL")
    if label is not None and name != "exfat":  # its label is a file of its root directory
        assert f'"{label}"' in found(name)[0]


def test_md_and_zfs_whose_tools_need_their_kernel_modules() -> None:
    """Made up from md_p.h (struct mdp_superblock_1) and the ZFS on-disk format, §1.3."""
    size = 4 << 20
    superblock = struct.pack("<II", 0xA92B4EFC, 1).ljust(32, b"\0") + b"host:mirror"
    for offset in (0, 4096, size - 8192):
        image = Image({"size": size, "pieces": {}})
        image.pieces = {offset: superblock}
        assert find_contents(image.read, size) == [Content("md RAID member", "host:mirror")]
    image.pieces = {size - 65536: struct.pack("<II", 0xA92B4EFC, 0)}
    assert find_contents(image.read, size) == [Content("md RAID member")]
    for order in ("<Q", ">Q"):
        image.pieces = {0x21000: struct.pack(order, 0x00BAB10C)}
        assert find_contents(image.read, size) == [Content("ZFS pool member")]


def test_a_label_cannot_command_a_terminal() -> None:
    image = Image(RECORDED["ext4"])
    image.pieces = {1024: image.read(1024, 0x78) + b"\x1b[2Jgone\n" + bytes(8)}
    assert [str(content) for content in find_contents(image.read, image.size)] == [
        'ext4 "?[2Jgone", 64 MiB'
    ]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023, 4096, 65535])
def test_very_small_things_are_looked_at_too(size: int) -> None:
    image = Image({"size": size, "pieces": {}})
    assert find_contents(image.read, size) == []


@given(
    name=st.sampled_from(sorted(RECORDED)),
    changes=st.lists(
        st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), max_size=6
    ),
)
def test_damaged_content_never_makes_the_search_fail(
    name: str, changes: list[tuple[int, bytes]]
) -> None:
    """`Image.read` fails for each read outside; nothing may take long either."""
    image = Image(RECORDED[name])
    starts = sorted(image.pieces) or [0]
    for place, data in changes:
        start = starts[place % len(starts)]
        piece = bytearray(image.pieces.get(start, bytes(64)))
        at = place % max(len(piece) - len(data), 1)
        piece[at : at + len(data)] = data
        image.pieces[start] = bytes(piece)
    for content in find_contents(image.read, image.size):
        assert str(content).isprintable()
