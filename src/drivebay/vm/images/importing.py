"""A file becomes an image: looked at, checked, converted to raw, read back.

Context: a short-lived process. The file may be anybody's. Until the last rename everything lies
in a workspace of the store, so a failure at any point leaves nothing.

    file ── formats ──► qemu-img check ──► room? ──► qemu-img convert ──► Images.add
    (or FILE.xz, unpacked first)
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from drivebay.disks.places import free_bytes, opened
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, StateError, UsageError
from drivebay.vm.images import qemu_img
from drivebay.vm.images.formats import PACKED, check_header, find_format, shown
from drivebay.vm.images.store import WHOLE, Image, ImageFacts, Images, Report, host_errors, quiet

__all__ = ["check_file", "create_empty", "export", "import_file", "name_from"]

_SIZE_MOST: Final = 64 << 40
_PIECE: Final = 1 << 20
# A packed image grows by hundreds; a bomb of zeroes by thousands.
_UNPACKED_MOST: Final = 1 << 40
_UNPACK_MEMORY_BYTES: Final = 1 << 29  # `xz -9` needs 65 MiB
_SUFFIXES: Final = (PACKED, ".qcow2", ".raw", ".img", ".vdi", ".vmdk", ".vhdx", ".iso")


def name_from(called: str) -> str:
    """A name for the image of a file: 'Web Server (1).qcow2' is 'Web-Server-1'."""
    name = called
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:40].strip("-._")
    if not name:
        raise UsageError(f"no name can be made of '{called[:80]}'", hint="add --name NAME")
    return name


def check_file(path: Path, called: str, expected: str, report: Report = quiet) -> None:
    """Compare a file with its SHA-256 or SHA-512. Raises: StateError, HostError."""
    digest = hashlib.sha512() if len(expected) == 128 else hashlib.sha256()
    with opened(path) as descriptor, host_errors(f"can't read '{path}'", path):
        size = os.lseek(descriptor, 0, os.SEEK_END)
        offset = 0
        while piece := os.pread(descriptor, _PIECE, offset):
            digest.update(piece)
            offset += len(piece)
            report(f"checking {called}", offset, size)
    if digest.hexdigest() != expected.lower():
        raise StateError(
            f"'{called}' is not what it should be: its {digest.name.upper()} is "
            f"{digest.hexdigest()}, and {expected.lower()} was expected"
        )


def import_file(
    images: Images,
    name: str,
    path: Path,
    facts: ImageFacts,
    *,
    called: str | None = None,
    kind: str | None = None,
    report: Report = quiet,
) -> Image:
    """Copy a file into the store. ``called`` is what people know it by, if not by its path.

    Raises: UsageError, StateError, InUse, HostError, AlreadyExists.
    """
    called = called or shown(path.name)
    images.check_free(name)
    with images.workspace() as work:
        if called.endswith(PACKED):
            path = _unpack(path, work / "unpacked", called, report)
        kind = find_format(path, called, kind)
        check_header(path, kind, called)
        if kind != "raw":
            qemu_img.check(path, kind, called)
        size = _survey(path, kind, called, work)
        raw = work / "raw"
        qemu_img.convert(path, kind, raw, "raw", called, size_most=size, report=report)
        if raw.stat().st_size != size:
            raise StateError(f"qemu-img wrote {raw.stat().st_size} bytes of '{called}', not {size}")
        return images.add(name, raw, facts, report)


def _survey(path: Path, kind: str, called: str, work: Path) -> int:
    """The size of the disk in a file, which has to be whole and for which there is room."""
    size = qemu_img.virtual_size(path, kind, called)
    if size == 0:
        raise UsageError(f"'{called}' is empty, and an image is not")
    if size > _SIZE_MOST:
        raise UsageError(
            f"'{called}' is {format_size(size)} large, and an image {format_size(_SIZE_MOST)} at "
            "most"
        )
    with opened(path) as descriptor:
        end = os.lseek(descriptor, 0, os.SEEK_END)
    data = 0
    for extent in qemu_img.extents(path, kind, called):
        data += extent.length
        # QEMU reads what lies behind the end of a file as zeroes, and says nothing.
        if kind != "raw" and extent.offset is not None and extent.offset + extent.length > end:
            raise StateError(
                f"'{called}' is cut off: it has {end} bytes, and its data reaches to "
                f"{extent.offset + extent.length}",
                hint="fetch or copy it again",
            )
    _check_room(called, data, work)
    return size


def _check_room(called: str, needed: int, folder: Path) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise StateError(
            f"'{called}' holds {format_size(needed)}, and where images are kept {format_size(free)}"
            f" are left: '{folder.parent}'",
            hint="make room there, or set XDG_DATA_HOME to a larger place",
        )


def _unpack(path: Path, target: Path, called: str, report: Report) -> Path:
    """Decompress an .xz file, sparsely. Raises: StateError when it is damaged, HostError."""
    size = path.stat().st_size
    zeroes = bytes(_PIECE)
    with (
        host_errors(f"can't unpack '{called}'", target),
        path.open("rb") as packed,
        target.open("wb") as file,
    ):
        try:
            for piece in _decompressed(packed):
                if piece == zeroes[: len(piece)]:
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    file.write(piece)
                if file.tell() > _UNPACKED_MOST:
                    raise UsageError(
                        f"'{called}' has more than {format_size(_UNPACKED_MOST)} when unpacked"
                    )
                report(f"unpacking {called}", packed.tell(), size)
        except (lzma.LZMAError, EOFError) as error:
            raise StateError(
                f"'{called}' can't be unpacked: it is damaged or cut off ({error})",
                hint="fetch or copy it again",
            ) from error
        file.truncate()
    return target


def _decompressed(packed: IO[bytes]) -> Iterator[bytes]:
    """The content of .xz streams, one behind the other. Raises: LZMAError, EOFError."""
    decoder: lzma.LZMADecompressor | None = None
    waiting = b""
    while True:
        if not waiting and (decoder is None or decoder.needs_input or decoder.eof):
            waiting = packed.read(_PIECE)
            if not waiting:
                break
        if decoder is None or decoder.eof:
            waiting = waiting.lstrip(b"\0")  # padding between streams
            if not waiting:
                continue
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_UNPACK_MEMORY_BYTES)
        yield decoder.decompress(waiting, _PIECE)
        waiting = decoder.unused_data
    if decoder is None or not decoder.eof:
        raise EOFError("its end is missing")


def create_empty(images: Images, name: str, size: int, report: Report = quiet) -> Image:
    """An image of zeroes, which takes up nothing. Raises: UsageError, HostError."""
    images.check_free(name)
    if not 0 < size <= _SIZE_MOST or size % WHOLE:
        raise UsageError(
            f"an image's size is a multiple of {format_size(WHOLE)} and at most "
            f"{format_size(_SIZE_MOST)}; {size} bytes is not that"
        )
    with images.workspace() as work:
        raw = work / "raw"
        with host_errors(f"can't make a file of {format_size(size)}", raw), raw.open("wb") as file:
            file.truncate(size)
        return images.add(name, raw, ImageFacts("created empty", cloud_init=False), report)


def export(image: Image, target: Path, kind: str, report: Report = quiet) -> None:
    """Write an image as a file of another format, at once or not at all.

    Raises: AlreadyExists, HostError, StateError.
    """
    if target.exists():
        raise AlreadyExists(f"there is a file '{target}' already")
    image.check_unchanged()
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    size_most = image.size + image.size // 8 + (64 << 20)  # with tables
    try:
        qemu_img.convert(
            image.path,
            "raw",
            new,
            kind,
            image.name,
            size_most=size_most,
            report=report,
            ours=True,
        )
        with host_errors(f"can't make '{target}'", target):
            new.rename(target)
    finally:
        new.unlink(missing_ok=True)
