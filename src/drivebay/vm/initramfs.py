"""The guest's first file system: busybox, kernel modules in loading order, and our scripts.

Context: any. Pure but for reading the files it packs; runs no program, needs no root.
The archive is cpio's "newc" format, uncompressed: it is small, and unpacking under an
emulated processor costs more than reading it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drivebay.errors import NotFound

__all__ = ["Archive", "modules_in_loading_order", "pack"]

TRAILER = "TRAILER!!!"


class Archive:
    """Collects entries of a newc archive; ``finish`` returns the bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._inode = 0

    def add_folder(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def add_symlink(self, name: str, to: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, to.encode())

    def finish(self) -> bytes:
        self._add(TRAILER, 0, b"")
        return bytes(self._bytes)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        # magic, then 8 hexadecimal digits each: ino mode uid gid nlink mtime filesize,
        # four device numbers, namesize, check
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._bytes += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._pad()
        self._bytes += data
        self._pad()

    def _pad(self) -> None:
        self._bytes += bytes(-len(self._bytes) % 4)


@dataclass(frozen=True)
class Module:
    """A kernel module as it goes into the archive."""

    name: str
    data: bytes


def modules_in_loading_order(tree: Path, wanted: Iterable[str]) -> list[Module]:
    """Return ``wanted`` and all they depend on, each after its own dependencies.

    The kernel treats '-' and '_' in module names alike; files use either.
    """
    files = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    ordered: dict[str, Module] = {}

    def load(name: str, asked_by: str) -> None:
        name = name.replace("-", "_")
        if name in ordered:
            return
        if name not in files:
            raise NotFound(
                f"kernel module '{name}', wanted by {asked_by}, "
                f"is not among the {len(files)} below {tree}"
            )
        data = files[name].read_bytes()
        for needed in _dependencies(data):
            load(needed, f"'{name}'")
        ordered[name] = Module(name, data)

    for name in wanted:
        load(name, "the guest")
    return list(ordered.values())


def _dependencies(module: bytes) -> list[str]:
    """Read the ``depends=`` string of the .modinfo section; its name is unique in the file."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    start += len(b"\0depends=")
    names = module[start : module.index(b"\0", start)].decode()
    return names.split(",") if names else []


def pack(busybox: bytes, modules: Sequence[Module], scripts: Mapping[str, bytes]) -> bytes:
    """Return the archive; ``scripts`` are executable files at their absolute guest paths."""
    archive = Archive()
    for folder in ("bin", "dev", "proc", "sys", "tmp", "mnt", "modules"):
        archive.add_folder(folder)
    archive.add_file("bin/busybox", busybox, 0o755)
    archive.add_symlink("bin/sh", "busybox")
    for module in modules:
        archive.add_file(f"modules/{module.name}.ko", module.data)
    order = "".join(f"{module.name}.ko\n" for module in modules)
    archive.add_file("modules/order", order.encode())
    for path, text in scripts.items():
        archive.add_file(path.lstrip("/"), text, 0o755)
    return archive.finish()
