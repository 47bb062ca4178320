"""Which format a disk image is in, and what in its header forbids to take it.

Context: a short-lived process; reads a file that anybody may have made, before QEMU does. QEMU
itself is never asked for the format: a raw disk's owner can write a qcow2 header into its first
sector, one that names any file of the host as its backing file. So the magic number counts only
when the file's name or the user says the same.

Sources: docs/interop/qcow2.txt of QEMU; MS-VHDX 2.2 to 2.6; "Virtual Disk Format 5.0" for VMDK.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final
from uuid import UUID

from drivebay.disks.places import opened
from drivebay.errors import StateError, UsageError

__all__ = ["FORMATS", "PACKED", "check_header", "find_format", "format_of_name", "shown"]

FORMATS: Final = ("raw", "qcow2", "vdi", "vmdk", "vhdx")

# Offset, bytes, format.
_MAGICS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk Descriptor", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
)
# What people take for an image by mistake, and what makes one of it.
_STRANGERS: Final = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"(\xb5/\xfd", "zstd", "unzstd"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"PK\x03\x04", "zip", "unzip"),
)
PACKED: Final = ".xz"  # what is unpacked on the way

_QCOW2: Final = struct.Struct(">4sIQIIQIIQQIIQQ")  # up to incompatible_features
_QCOW2_EXTERNAL_DATA: Final = 1 << 2
_BACKING_NAME_MOST: Final = 1023
_VMDK_DESCRIPTOR_MOST: Final = 128  # sectors; QEMU writes 20


def format_of_name(name: str) -> str | None:
    """The format that a file's name says; None if it could be any."""
    suffix = Path(name.removesuffix(PACKED)).suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else None


def find_format(path: Path, called: str, named: str | None) -> str:
    """The format of a file: by its content, and by its name or what the user says.

    ``called`` is the name by which people know it. Raises: UsageError, HostError.
    """
    magic = _magic_format(path)
    wanted = named or format_of_name(called)
    if wanted == "raw" or (wanted is None and magic is None):
        if named is None:
            _refuse_strangers(path, called)
        return "raw"
    if magic is None:
        raise UsageError(
            f"'{called}' is no {wanted} image: its header is not one; it is damaged, cut off or "
            "something else",
            hint="if it is a raw image: --format raw",
        )
    if wanted is None:
        raise UsageError(
            f"'{called}' looks like a {magic} image, but its name doesn't say so",
            hint=f"--format {magic} if it is one; --format raw if it is a disk's own content",
        )
    if wanted != magic:
        raise UsageError(
            f"'{called}' is no {wanted} image: its header is that of {magic}",
            hint=f"--format {magic}",
        )
    return magic


def _magic_format(path: Path) -> str | None:
    with opened(path) as descriptor:
        start = os.pread(descriptor, 512, 0)
    for offset, magic, name in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return name
    return None


def _refuse_strangers(path: Path, called: str) -> None:
    with opened(path) as descriptor:
        start = os.pread(descriptor, 512, 0)
    for magic, name, tool in _STRANGERS:
        if start.startswith(magic):
            raise UsageError(f"'{called}' is compressed by {name}", hint=f"{tool} it first")
    if start.startswith((b"conectix", b"COWD")):
        raise UsageError(
            f"'{called}' is a VHD image, which is not among {', '.join(FORMATS)}",
            hint="qemu-img convert -f vpc -O qcow2 makes one of them",
        )
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UsageError(f"'{called}' is a web page and no disk image")


def check_header(path: Path, kind: str, called: str) -> None:
    """Refuse an image that needs other files or a key, or that is cut off.

    Raises: UsageError, StateError, HostError.
    """
    with opened(path) as descriptor:
        image = _File(descriptor, called)
        if kind == "qcow2":
            _check_qcow2(image)
        elif kind == "vmdk":
            _check_vmdk(image)
        elif kind == "vhdx":
            _check_vhdx(image)


class _File:
    """An image to look into; what lies behind its end can't be read."""

    def __init__(self, descriptor: int, called: str) -> None:
        self._descriptor = descriptor
        self.called = called
        self.size = os.lseek(descriptor, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        found = b"" if offset > self.size else os.pread(self._descriptor, length, offset)
        if len(found) < length:
            raise self.cut_off()
        return found

    def cut_off(self) -> StateError:
        return StateError(
            f"'{self.called}' is cut off: it ends after {self.size} bytes, in the midst of what "
            "its header promises",
            hint="fetch or copy it again",
        )


def _check_qcow2(image: _File) -> None:
    (_, version, backing, length, _, _, crypt, *_, incompatible) = _QCOW2.unpack(
        image.read(0, _QCOW2.size).ljust(_QCOW2.size)
    )[:14]
    if version not in (2, 3):
        raise UsageError(f"'{image.called}' is QCOW version {version}; 2 and 3 can be taken")
    if backing:
        if length > _BACKING_NAME_MOST:
            raise StateError(f"'{image.called}' is damaged: a backing file's name is too long")
        name = shown(image.read(backing, length))
        raise UsageError(
            f"'{image.called}' holds only what differs from another file, its backing file "
            f"'{name}'",
            hint="make one file of the two where both are: qemu-img convert -O qcow2",
        )
    if version == 3 and incompatible & _QCOW2_EXTERNAL_DATA:
        raise UsageError(
            f"'{image.called}' keeps its data in another file",
            hint="make one file of the two where both are: qemu-img convert -O qcow2",
        )
    if crypt:
        raise UsageError(
            f"'{image.called}' is encrypted",
            hint="decrypt it first: qemu-img convert with --object secret",
        )


def _check_vmdk(image: _File) -> None:
    """Only one file that holds everything: a descriptor may name any file of the host."""
    if image.read(0, 4) != b"KDMV":
        raise _not_one_file(image)
    capacity, _, sector, sectors = struct.unpack("<QQQQ", image.read(12, 32))
    if capacity == 0 or sector == 0 or sectors > _VMDK_DESCRIPTOR_MOST:
        raise _not_one_file(image)
    text = image.read(sector * 512, sectors * 512)
    if _vmdk_value(text, b"createType") not in ("monolithicSparse", "streamOptimized"):
        raise _not_one_file(image)
    parent = _vmdk_value(text, b"parentFileNameHint")
    if parent:
        raise UsageError(
            f"'{image.called}' holds only what differs from another file, its parent '{parent}'",
            hint="make one file of the two where both are: qemu-img convert -O vmdk",
        )


def _not_one_file(image: _File) -> UsageError:
    return UsageError(
        f"'{image.called}' is a VMDK whose data lies in other files",
        hint="make one file of them where they are: qemu-img convert -O qcow2",
    )


def _vmdk_value(text: bytes, key: bytes) -> str:
    for line in text.split(b"\0", 1)[0].splitlines():
        name, _, value = line.partition(b"=")
        if name.strip() == key:
            return shown(value.strip().strip(b'"'))
    return ""


def shown(name: bytes | str) -> str:
    """A name from a header or folder, without what a terminal would obey."""
    text = name[:1000] if isinstance(name, str) else name[:1000].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- VHDX: QEMU reads blocks behind the end of the file as zeroes -------------------------------

_MIB: Final = 1 << 20
_REGION_TABLE: Final = 192 << 10
_REGIONS_MOST: Final = 2047
_BAT: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_FILE_PARAMETERS: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_BLOCK_MOST: Final = 256 * _MIB
_BAT_BYTES_MOST: Final = 1 << 30
_PRESENT: Final = (6, 7)


def _check_vhdx(image: _File) -> None:
    regions = _vhdx_regions(image)
    if _BAT not in regions or _METADATA not in regions:
        raise StateError(f"'{image.called}' is damaged: it has no table of its blocks")
    block = _vhdx_block_bytes(image, regions[_METADATA][0])
    offset, left = regions[_BAT]
    while left > 0:
        piece = image.read(offset, min(left, _MIB))
        for (entry,) in struct.iter_unpack("<Q", piece):
            if entry & 7 in _PRESENT and (entry >> 20) * _MIB + block > image.size:
                raise image.cut_off()
        offset, left = offset + len(piece), left - len(piece)


def _vhdx_regions(image: _File) -> dict[bytes, tuple[int, int]]:
    """Where the table of blocks and the metadata lie: (offset, length)."""
    signature, _, count, _ = struct.unpack("<4sIII", image.read(_REGION_TABLE, 16))
    if signature != b"regi" or count > _REGIONS_MOST:
        raise StateError(f"'{image.called}' is damaged: it has no region table")
    entries = struct.iter_unpack("<16sQII", image.read(_REGION_TABLE + 16, 32 * count))
    found = {guid: (offset, length) for guid, offset, length, _ in entries}
    if any(length % 8 or length > _BAT_BYTES_MOST for _, length in found.values()):
        raise StateError(f"'{image.called}' is damaged: a region has a length that can't be")
    return found


def _vhdx_block_bytes(image: _File, metadata: int) -> int:
    signature, _, count = struct.unpack("<8sHH", image.read(metadata, 12))
    if signature == b"metadata" and count <= _REGIONS_MOST:
        for guid, offset, *_ in struct.iter_unpack(
            "<16sIIII", image.read(metadata + 32, 32 * count)
        ):
            if guid == _FILE_PARAMETERS:
                block, flags = struct.unpack("<II", image.read(metadata + offset, 8))
                if flags & 2:
                    raise UsageError(
                        f"'{image.called}' holds only what differs from another file, its parent"
                    )
                if _MIB <= block <= _BLOCK_MOST:
                    return int(block)
    raise StateError(f"'{image.called}' is damaged: it doesn't say how large its blocks are")
