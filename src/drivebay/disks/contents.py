"""What a file, disk or partition holds already: told by the marks that formats leave.

Context: any; pure but for the ``read`` it is given. Nothing is trusted: the bytes may be
anybody's, so each offset and length that they name is checked before it is read. The list of
formats is the usual one of Linux tools; what is not on it is not seen, so an answer of nothing
does not mean that a disk is empty (`holds_data` of disks.places asks the file system that).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from drivebay.disks.sizes import format_size

__all__ = ["Content", "Reader", "find_contents"]

Reader = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Content:
    """One thing that was found; ``size`` is what it says of itself, None if it does not."""

    kind: str
    label: str = ""
    size: int | None = None

    def __str__(self) -> str:
        """As people say it: 'ext4 "backup", 180 GiB'."""
        named = f'{self.kind} "{self.label}"' if self.label else self.kind
        return named if self.size is None else f"{named}, {format_size(self.size)}"


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Something to look into: ``read`` answers zeroes behind the end."""

    reader: Reader
    size: int

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset >= self.size:
            return bytes(length)
        return self.reader(offset, min(length, self.size - offset)).ljust(length, b"\0")

    def get(self, offset: int, layout: str) -> int:
        """One little-endian number (or big-endian, if the layout says so)."""
        layout = layout if layout[0] == ">" else "<" + layout
        found: int = struct.unpack(layout, self.read(offset, struct.calcsize(layout)))[0]
        return found


def find_contents(read: Reader, size: int) -> list[Content]:
    """Everything that is recognized in ``size`` bytes, the outermost first."""
    data = _Bytes(read, size)
    found = [content for look in _LOOKS for content in look(data)]
    # A boot sector of a file system ends as a partition table does.
    if any(content.kind in _BOOT_SECTORS for content in found):
        found = [content for content in found if not content.kind.startswith(_MBR)]
    return found


def _text(raw: bytes, encoding: str = "utf-8") -> str:
    """A label: up to the first NUL, without what a terminal would obey."""
    text = raw.decode(encoding, errors="replace").partition("\0")[0].strip()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- tables of partitions -------------------------------------------------------------------

_MBR: Final = "MBR partition table"
_BOOT_SECTORS: Final = {"FAT12", "FAT16", "FAT32", "NTFS", "exFAT"}
_ENTRIES_MOST: Final = 256


def _partition_tables(data: _Bytes) -> Iterator[Content]:
    for block in (512, 4096):
        if data.read(block, 8) == b"EFI PART":
            yield _gpt(data, block)
            return
    for block in (512, 4096):  # the first one may be damaged: the copy in the last block counts
        if data.size >= 2 * block and data.read(data.size // block * block - block, 8) == (
            b"EFI PART"
        ):
            yield Content("GPT partition table, damaged")
            return
    if data.read(510, 2) == b"\x55\xaa" and (used := _mbr_entries(data)):
        yield Content(f"{_MBR}, {_spell_count(used, 'partition')}")


def _gpt(data: _Bytes, block: int) -> Content:
    first, count, length = (data.get(block + 72, "Q"), data.get(block + 80, "I"),
                            data.get(block + 84, "I"))  # fmt: skip
    if not 128 <= length <= 4096 or count > _ENTRIES_MOST:
        return Content("GPT partition table, damaged")
    used = sum(any(data.read(first * block + i * length, 16)) for i in range(count))
    return Content(f"GPT partition table, {_spell_count(used, 'partition')}")


def _mbr_entries(data: _Bytes) -> int:
    """How many of the four entries are used; 0 if one of them makes no sense."""
    used = 0
    for offset in range(446, 510, 16):
        status, kind = data.get(offset, "B"), data.get(offset + 4, "B")
        start, length = data.get(offset + 8, "I"), data.get(offset + 12, "I")
        if status not in (0x00, 0x80):
            return 0
        used += bool(kind and start and length)
    return used


def _spell_count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- file systems ---------------------------------------------------------------------------


def _ext(data: _Bytes) -> Iterator[Content]:
    """struct ext4_super_block at 1024 (Documentation/filesystems/ext4 of Linux)."""
    if data.get(1024 + 0x38, "H") != 0xEF53:
        return
    has_journal = data.get(1024 + 0x5C, "I") & 0x4
    incompat, ro_compat = data.get(1024 + 0x60, "I"), data.get(1024 + 0x64, "I")
    # Extents, 64 bits, flexible groups; huge files, checksums and other marks of ext4 alone.
    is_ext4 = incompat & 0x2C0 or ro_compat & 0x478
    kind = "ext4" if is_ext4 else "ext3" if has_journal else "ext2"
    blocks = data.get(1024 + 0x04, "I")
    if incompat & 0x80:
        blocks |= data.get(1024 + 0x150, "I") << 32
    log_size = data.get(1024 + 0x18, "I")
    yield Content(kind, _text(data.read(1024 + 0x78, 16)), blocks << (10 + min(log_size, 6)))


def _xfs(data: _Bytes) -> Iterator[Content]:
    if data.read(0, 4) == b"XFSB":
        size = data.get(4, ">I") * data.get(8, ">Q")
        yield Content("XFS", _text(data.read(108, 12)), size)


def _btrfs(data: _Bytes) -> Iterator[Content]:
    if data.read(0x10040, 8) == b"_BHRfS_M":
        # total_bytes is of all devices; dev_item (at 0xC9) has this one's size.
        yield Content("btrfs", _text(data.read(0x1012B, 256)), data.get(0x100C9 + 8, "Q"))


def _fat(data: _Bytes) -> Iterator[Content]:
    """BIOS parameter block: some numbers that must make sense, and no mark of its own."""
    sector, cluster = data.get(11, "H"), data.get(13, "B")
    if data.read(3, 8) == b"NTFS    ":
        yield from _ntfs(data)
        return
    if data.read(3, 8) == b"EXFAT   ":
        shift = data.get(108, "B")
        yield Content("exFAT", "", data.get(72, "Q") << min(shift, 12))
        return
    reserved, fats = data.get(14, "H"), data.get(16, "B")
    makes_sense = (
        data.read(510, 2) == b"\x55\xaa"
        and sector in (512, 1024, 2048, 4096)
        and cluster.bit_count() == 1
        and reserved
        and fats in (1, 2)
        and data.get(21, "B") >= 0xF0
    )
    if not makes_sense:
        return
    per_fat, roots = data.get(22, "H"), data.get(17, "H")
    total = data.get(19, "H") or data.get(32, "I")
    label = 71 if per_fat == 0 else 43
    per_fat = per_fat or data.get(36, "I")
    overhead = reserved + fats * per_fat + (roots * 32 + sector - 1) // sector
    clusters = (total - overhead) // cluster
    kind = "FAT32" if label == 71 else "FAT12" if clusters < 4085 else "FAT16"
    name = _text(data.read(label, 11), "cp437")
    yield Content(kind, "" if name == "NO NAME" else name, total * sector)


def _ntfs(data: _Bytes) -> Iterator[Content]:
    """Its label is the attribute 0x60 of record 3 of the master file table."""
    sector, cluster = data.get(11, "H"), data.get(13, "B")
    # From 0x80 on the number is a negative power of two.
    per_cluster = 1 << (256 - cluster) if cluster > 0x80 else cluster
    raw = data.get(64, "B")
    record_bytes = 1 << (256 - raw) if raw > 0x80 else raw * per_cluster * sector
    label = ""
    if 512 <= record_bytes <= 65536 and per_cluster <= 4096:
        start = data.get(48, "Q") * per_cluster * sector + 3 * record_bytes
        label = _volume_name(data.read(start, record_bytes))
    yield Content("NTFS", label, (data.get(40, "Q") + 1) * sector)


def _volume_name(record: bytes) -> str:
    if record[:4] != b"FILE":
        return ""
    at = struct.unpack_from("<H", record, 20)[0]
    for _ in range(32):
        if at + 24 > len(record):
            return ""
        kind, length = struct.unpack_from("<II", record, at)
        if kind == 0x60:
            size, offset = struct.unpack_from("<IH", record, at + 16)
            return _text(record[at + offset : at + offset + min(size, 256)], "utf-16-le")
        if kind == 0xFFFFFFFF or length < 24:
            return ""
        at += length
    return ""


def _f2fs(data: _Bytes) -> Iterator[Content]:
    if data.get(1024, "I") == 0xF2F52010:
        label = _text(data.read(1024 + 0x7C, 1024), "utf-16-le")
        log_block = min(data.get(1024 + 16, "I"), 16)
        yield Content("F2FS", label, data.get(1024 + 36, "Q") << log_block)


def _other_file_systems(data: _Bytes) -> Iterator[Content]:
    if data.read(0x8001, 5) == b"CD001":
        size = data.get(0x8050, "I") * data.get(0x8080, "H")
        yield Content("ISO 9660", _text(data.read(0x8028, 32)), size)
    if data.read(0, 4) == b"hsqs":
        yield Content("SquashFS", "", data.get(40, "Q"))
    if data.get(1024, "I") == 0xE0F5E1E2:
        yield Content("EROFS", _text(data.read(1024 + 64, 16)))
    if data.read(0x10034, 6) == b"ReIsEr":
        yield Content("ReiserFS", _text(data.read(0x10064, 16)))
    if data.read(0x8000, 4) == b"JFS1":
        yield Content("JFS", _text(data.read(0x8098, 16)))


# ---- what is stacked below file systems -----------------------------------------------------


def _swap(data: _Bytes) -> Iterator[Content]:
    for page in (4096, 8192, 16384, 65536):
        if data.read(page - 10, 10) in (b"SWAPSPACE2", b"SWAP-SPACE"):
            yield Content("swap", _text(data.read(1052, 16)), (data.get(1028, "I") + 1) * page)
            return


def _lvm(data: _Bytes) -> Iterator[Content]:
    """pv_header behind a label in one of the first four sectors; it lists metadata areas."""
    for sector in range(0, 2048, 512):
        if data.read(sector, 8) != b"LABELONE" or data.read(sector + 24, 8) != b"LVM2 001":
            continue
        header = sector + min(data.get(sector + 20, "I"), 480)
        yield Content(
            "LVM physical volume", _volume_group(data, header), data.get(header + 32, "Q")
        )
        return


def _volume_group(data: _Bytes, header: int) -> str:
    at = header + 40
    for _ in range(8):  # data areas, up to one of zeroes
        offset = data.get(at, "Q")
        at += 16
        if offset == 0:
            break
    area = data.get(at, "Q")
    if area == 0 or data.read(area + 4, 16) != b" LVM2 x[5A%r0N*>":
        return ""
    text = data.read(area + data.get(area + 40, "Q"), 256)
    name, brace, _ = text.partition(b" {")
    return _text(name) if brace and b"\n" not in name else ""


def _md(data: _Bytes) -> Iterator[Content]:
    """Superblock 1.0 near the end, 1.1 at the start, 1.2 at 4 KiB; 0.90 near the end."""
    end = data.size
    for offset in ((end - 8192) // 4096 * 4096, 0, 4096):
        if data.get(offset, "I") == 0xA92B4EFC and data.get(offset + 4, "I") == 1:
            yield Content("md RAID member", _text(data.read(offset + 32, 32)))
            return
    offset = end // 65536 * 65536 - 65536
    if offset >= 0 and data.get(offset, "I") == 0xA92B4EFC:
        yield Content("md RAID member")


def _encrypted(data: _Bytes) -> Iterator[Content]:
    if data.read(0, 6) == b"LUKS\xba\xbe":
        version = data.get(6, ">H")
        label = _text(data.read(24, 48)) if version == 2 else ""
        yield Content(f"LUKS{version} encrypted volume", label)
    if data.read(0, 11) == b"\xeb\x58\x90-FVE-FS-":
        yield Content("BitLocker volume")


def _zfs(data: _Bytes) -> Iterator[Content]:
    """Uberblocks stand in the second half of the label of 256 KiB, in the writer's byte order."""
    for offset in range(0x20000, 0x40000, 1024):
        if data.read(offset, 8) in (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c"):
            yield Content("ZFS pool member")
            return


def _bcache(data: _Bytes) -> Iterator[Content]:
    magic = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"
    if data.read(4096 + 24, 16) == magic:
        yield Content("bcache device", _text(data.read(4096 + 72, 32)))


def _lvstore(data: _Bytes) -> Iterator[Content]:
    """Super block of SPDK's blobstore; the store's name is an xattr of its super blob."""
    if data.read(0, 8) != b"SPDKBLOB":
        return
    kind = "pool" if data.read(56, 9) == b"LVOLSTORE" else "SPDK blobstore"
    size = data.get(80, "Q") if data.get(8, "I") >= 3 else 0
    yield Content(kind, _store_name(data), size or None)


def _store_name(data: _Bytes) -> str:
    """The super blob's first metadata page: descriptors of type, length and content."""
    page_bytes = data.get(92, "I") or 4096
    if page_bytes > 65536:
        return ""
    page = data.get(48, "I") + (data.get(20, "Q") & 0xFFFFFFFF)
    raw = data.read(page * page_bytes, page_bytes)
    at = 16
    while at + 9 <= len(raw) - 8:
        kind, length = struct.unpack_from("<BI", raw, at)
        name_length, value_length = struct.unpack_from("<HH", raw, at + 5)
        if kind == 2 and raw[at + 9 : at + 9 + name_length] == b"name":
            start = at + 9 + name_length
            return _text(raw[start : start + min(value_length, 64)])
        if kind == 0 and length == 0:
            break
        at += 5 + length
    return ""


def _spdk_raid(data: _Bytes) -> Iterator[Content]:
    if data.read(0, 8) == b"SPDKRAID":
        yield Content("SPDK RAID member", _text(data.read(40, 64)))


# ---- images of disks ------------------------------------------------------------------------

_IMAGES: Final = ((0, b"QFI\xfb", "qcow2 image"), (0, b"KDMV", "VMDK image"),
                  (0, b"vhdxfile", "VHDX image"), (0, b"conectix", "VHD image"),
                  (0x40, b"\x7f\x10\xda\xbe", "VDI image"))  # fmt: skip


def _images(data: _Bytes) -> Iterator[Content]:
    for offset, magic, kind in (*_IMAGES, (data.size - 512, b"conectix", "VHD image")):
        if data.read(offset, len(magic)) == magic:
            size = data.get(24, ">Q") if kind == "qcow2 image" else None
            yield Content(kind, "", size)
            return


_LOOKS: Final = (
    _partition_tables, _images, _lvstore, _spdk_raid, _md, _lvm, _zfs, _bcache, _encrypted,
    _ext, _xfs, _btrfs, _fat, _f2fs, _other_file_systems, _swap,
)  # fmt: skip
