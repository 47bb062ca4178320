"""A raw disk that both BIOS and UEFI start, made of files alone: no loop device, no mount.

Context: any process, as root or not; a few seconds. A root file system that is made
elsewhere (in a user namespace, say) fits in: `root_filesystem` only gives the command.

    0       1 MiB        2 MiB   10 MiB                                         end
    │ GPT   │ BIOS boot  │ EFI   │ root: ext4, with /boot/grub/grub.cfg         │ GPT
    │ MBR ──┼─► core.img │ FAT   │        ▲                                     │ (copy)
            └─────┬──────┴─ BOOTX64.EFI   │
                  └────────────┴──────────┘  GRUB, which knows its own disk's third partition

The root partition is the last one, so that it can grow with the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, InternalError, NotFound

__all__ = [
    "add_loaders",
    "check_tools",
    "grub_config",
    "last_line",
    "make_bootable",
    "make_table",
    "root_filesystem",
    "run_tool",
    "tools_environment",
]

GRUB: Final = Path("/usr/lib/grub")
BOOT_SECTOR: Final = GRUB / "i386-pc" / "boot.img"
# What is needed, and Debian's package of it.
TOOLS: Final = {
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmd": "mtools",
    "mcopy": "mtools",
    "grub-mkimage": "grub-common",
    str(BOOT_SECTOR): "grub-pc-bin",
    str(GRUB / "x86_64-efi" / "moddep.lst"): "grub-efi-amd64-bin",
}
TOOL_SECONDS: Final = 600

SECTOR: Final = 512
MIB: Final = 1 << 20
CORE_AT: Final = 1 * MIB
EFI_AT: Final = 2 * MIB
ROOT_AT: Final = 10 * MIB
TAIL: Final = 1 * MIB  # the table's copy, and the root partition ends on a whole MiB
ROOT_PARTITION: Final = 3
BIOS_BOOT_TYPE: Final = "21686148-6449-6E6F-744E-656564454649"

GRUB_MODULES: Final = ("part_gpt", "ext2", "normal", "linux", "serial", "terminal", "test",
                       "boot")  # fmt: skip
GRUB_CONFIG: Final = """\
if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
fi
set timeout_style=hidden
set timeout=1
menuentry '{title}' {{
    linux /vmlinuz root=UUID={uuid} {words}
    initrd /initrd.img
}}
"""


def make_bootable(root: Path, raw: Path, size: int, uuid: str) -> None:
    """Make the file ``raw``, a disk of ``size`` bytes, from a folder with a Linux system.

    The folder has ``/vmlinuz``, ``/initrd.img`` and ``/boot/grub/grub.cfg`` (`grub_config`);
    ``uuid`` is what its file system will have. An ordinary user's files become root's.

    Raises: NotFound for a missing tool, HostError for one that fails.
    """
    check_tools()
    make_table(raw, size)
    as_root = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    run_tool([*as_root, *root_filesystem(str(root), str(raw), size, uuid)])
    add_loaders(raw)


def check_tools(more: Mapping[str, str] | None = None) -> None:
    """Look for all that is needed, and ``more`` (each with its package). Raises: NotFound."""
    wanted = {**TOOLS, **(more or {})}
    path = tools_environment()["PATH"]
    missing = [name for name in wanted if shutil.which(name, os.F_OK, path) is None]
    if missing:
        packages = sorted({wanted[name] for name in missing})
        raise NotFound(
            f"an image cannot be built without {', '.join(missing)}",
            hint=f"sudo apt-get install --no-install-recommends {' '.join(packages)}",
        )


def grub_config(title: str, uuid: str, words: str) -> str:
    """The text of /boot/grub/grub.cfg; ``words`` are the kernel's, beside its root.

    Debian keeps the links /vmlinuz and /initrd.img up to date, so the file can stay as it is.
    """
    return GRUB_CONFIG.format(title=title, uuid=uuid, words=words)


def make_table(raw: Path, size: int) -> None:
    """Make ``raw``, which must not exist: ``size`` bytes, sparse, with a partition table."""
    if size % MIB or size < ROOT_AT + TAIL + 4 * MIB:
        raise InternalError(f"a bootable disk of {size} bytes: whole MiB, and at least 15, please")
    with raw.open("xb") as file:
        file.truncate(size)
    rows = [
        (CORE_AT, EFI_AT - CORE_AT, BIOS_BOOT_TYPE),
        (EFI_AT, ROOT_AT - EFI_AT, "U"),
        (ROOT_AT, size - TAIL - ROOT_AT, "L"),
    ]
    lines = [f"start={at // SECTOR}, size={length // SECTOR}, type={kind}\n"
             for at, length, kind in rows]  # fmt: skip
    run_tool(["sfdisk", "--quiet", str(raw)], "".join(["label: gpt\n", *lines]).encode())


def root_filesystem(folder: str, raw: str, size: int, uuid: str) -> list[str]:
    """The command that fills the root partition of ``raw`` with all that is below ``folder``."""
    kib = (size - TAIL - ROOT_AT) // 1024
    place = ["-E", f"offset={ROOT_AT}", "-d", folder, raw, f"{kib}k"]
    return ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", uuid, *place]


def add_loaders(raw: Path) -> None:
    """Write GRUB for BIOS and for UEFI beside the root partition."""
    core = _grub("i386-pc", "biosdisk")
    loader = _grub("x86_64-efi", "fat")
    if len(core) > EFI_AT - CORE_AT:
        raise InternalError(f"GRUB's core of {len(core)} bytes is too long for its partition")
    kib = (ROOT_AT - EFI_AT) // 1024
    at = f"{raw}@@{EFI_AT}"
    place = [f"--offset={EFI_AT // SECTOR}", str(raw), str(kib)]
    run_tool(["mkfs.vfat", "-F", "12", "-n", "EFI", *place])
    run_tool(["mmd", "-i", at, "::/EFI", "::/EFI/BOOT"])
    run_tool(["mcopy", "-i", at, "-", "::/EFI/BOOT/BOOTX64.EFI"], loader)
    with raw.open("r+b") as file:
        sector = _boot_sector(BOOT_SECTOR.read_bytes(), file.read(SECTOR))
        file.seek(0)
        file.write(sector)
        file.seek(CORE_AT)
        file.write(_placed(core))


def _grub(platform: str, *modules: str) -> bytes:
    """GRUB's core for a platform.

    A prefix without a drive means the drive that GRUB was read from: a disk starts itself
    even when a copy of it, with the same UUIDs, is beside it.
    """
    words = ["grub-mkimage", "-O", platform, "-p", f"(,gpt{ROOT_PARTITION})/boot/grub"]
    with tempfile.NamedTemporaryFile() as file:  # it can't write to a pipe, which has no fsync
        run_tool([*words, "-o", file.name, *modules, *GRUB_MODULES])
        return Path(file.name).read_bytes()


# GRUB's own installer wants a block device, and this is all that it would change. Places in
# boot.img are those of include/grub/i386/pc/boot.h, what is written there is of util/setup.c
# (GRUB 2.06).
_KERNEL_SECTOR: Final = 0x5C  # u64: where core.img begins
_BOOT_DRIVE: Final = 0x64  # 0xff: the drive that the BIOS names
_DRIVE_CHECK: Final = 0x66  # a jump over the mending of what a BIOS says wrongly
_DISK_ID: Final = 0x1B8  # from here on the sector is the partition table's
_BLOCK_LIST: Final = SECTOR - 12  # the end of core.img's first sector: where its rest lies
_CORE_SEGMENT: Final = 0x820  # … and to which real-mode segment it is read


def _boot_sector(image: bytes, present: bytes) -> bytes:
    """boot.img for a hard disk, with the partition table of the sector that is there."""
    sector = bytearray(image[:_DISK_ID] + present[_DISK_ID:])
    struct.pack_into("<Q", sector, _KERNEL_SECTOR, CORE_AT // SECTOR)
    sector[_BOOT_DRIVE] = 0xFF
    sector[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"  # two times nop
    return bytes(sector)


def _placed(core: bytes) -> bytes:
    """core.img in whole sectors; its first one tells where the others are."""
    sectors = bytearray(core + bytes(-len(core) % SECTOR))
    rest = len(sectors) // SECTOR - 1
    struct.pack_into("<QHH", sectors, _BLOCK_LIST, CORE_AT // SECTOR + 1, rest, _CORE_SEGMENT)
    return bytes(sectors)


def tools_environment() -> dict[str, str]:
    """For tools that live in sbin, which an ordinary user of Debian does not have on PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return {**os.environ, "PATH": path, "LC_ALL": "C"}


def run_tool(words: Sequence[str], text: bytes = b"") -> bytes:
    """Run a program with ``text`` as its input; return its output. Raises: HostError."""
    try:
        done = subprocess.run(
            words,
            input=text,
            capture_output=True,
            timeout=TOOL_SECONDS,
            check=False,
            env=tools_environment(),
        )
    except OSError as error:
        raise HostError(f"cannot run {words[0]}", error.errno or errno.EIO) from error
    except subprocess.TimeoutExpired as error:
        late = f"{words[0]} did not end within {TOOL_SECONDS} s"
        raise HostError(late, errno.ETIMEDOUT) from error
    if done.returncode != 0:
        said = last_line(done.stderr.decode(errors="replace"))
        raise HostError(f"{words[0]} failed and said: {said}", errno.EIO)
    return done.stdout


def last_line(text: str) -> str:
    """What a tool said at last, to be quoted."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing"
