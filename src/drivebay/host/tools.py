"""Programs and files of other packages that some commands need.

Context: a short-lived process; only looks whether they are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from drivebay.errors import NotFound
from drivebay.host.finding import Finding
from drivebay.vm.firmware import find_uefi
from drivebay.vm.packages import everywhere, install_command
from drivebay.vm.virtiofsd import ELSEWHERE

__all__ = ["check_tools"]


class _Tool(NamedTuple):
    names: tuple[str, ...]  # one of them is enough
    part: str
    level: str  # without it
    use: str


# sbin is not on everybody's PATH, and these tools do not need its rights.
_MORE_PATHS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_TOOLS: Final = (
    _Tool(("qemu-img",), "qemu-img", "warning", "to import and convert images"),
    _Tool(("ssh",), "ssh", "warning", "for 'vm ssh' and 'vm cp'"),
    _Tool(("ssh-keygen",), "ssh", "problem", "for the keys of VMs"),
    _Tool(("virtiofsd", *ELSEWHERE), "virtiofsd", "note", "for --share"),
    _Tool(("mmdebstrap",), "mmdebstrap", "note", "for 'image build debian'"),
    _Tool(("grub-mkimage", "grub2-mkimage"), "grub-bios", "note", "for 'image build'"),
    _Tool(("mke2fs",), "e2fsprogs", "note", "for 'image build'"),
    _Tool(("mkfs.vfat",), "dosfstools", "note", "for 'image build'"),
    _Tool(("mcopy",), "mtools", "note", "for 'image build'"),
)
_GRUB: Final = (
    ("i386-pc", "grub-bios", "for images that start by BIOS"),
    ("x86_64-efi", "grub-uefi", "for images that start by UEFI"),
)


def check_tools(grub: Path = Path("/usr/lib/grub")) -> Iterator[Finding]:
    """Say of each whether it is there, and what is impossible without it."""
    for tool in _TOOLS:
        found = next(filter(None, map(_find, tool.names)), None)
        if found is not None:
            yield Finding("ok", "tools", f"{found}: {tool.use}")
        else:
            yield _absent(tool.level, f"no {tool.names[0]}: {tool.use}", tool.part)
    for folder, part, use in _GRUB:
        if (grub / folder).is_dir():
            yield Finding("ok", "tools", f"{grub / folder}: {use}")
        else:
            yield _absent("note", f"no {grub / folder}: {use}", part)
    try:
        code, _ = find_uefi()
    except NotFound as error:
        yield _absent("note", f"{error}: for --firmware uefi", "ovmf")
    else:
        yield Finding("ok", "tools", f"{code}: for --firmware uefi")


def _find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=":".join(_MORE_PATHS))


def _absent(level: str, what: str, part: str) -> Finding:
    return Finding(level, "tools", what, install_command(part) or f"install {everywhere(part)}")
