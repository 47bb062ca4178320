"""ISOs that BIOS and UEFI boot, as installers are: made of files alone, by pycdlib and GRUB.

firmware ─► El Torito: GRUB ─► boot/grub/grub.cfg on the CD ─► kernel and initrd on the CD
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pycdlib

from drivebay.vm.images.bootable import check_tools, run_tool

MODULES: Final = ("iso9660", "normal", "linux", "serial", "terminal", "test", "search",
                  "search_label", "boot")  # fmt: skip
# UEFI names the small FAT file system from which it took GRUB, and not the CD.
FIND_THE_CD: Final = "search --no-floppy --set=root --label {label}\nset prefix=($root)/boot/grub\n"
FAT_KIB: Final = 2048
# GRUB reads ahead, and what it reads of a CD's last sectors are zeros when that passes the end.
PADDING: Final = 150 * 2048
GRUB_CONFIG: Final = """\
if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
fi
set timeout_style=hidden
set timeout=0
menuentry 'Install' {{
    linux {kernel} {words}
    initrd {initrd}
}}
"""


def write_iso(
    path: Path, label: str, files: Mapping[str, Path | bytes], kernel: str, initrd: str, words: str
) -> None:
    """Write the ISO ``path`` with ``files`` by their places on it, such as '/casper/vmlinuz'.

    GRUB starts ``kernel`` with ``initrd``, which are two of them, and ``words``.
    """
    check_tools()
    config = GRUB_CONFIG.format(kernel=kernel, initrd=initrd, words=words)
    everything = {
        **files,
        "/boot/grub/grub.cfg": config.encode(),
        "/boot/grub/bios.img": _grub("i386-pc-eltorito", label, "biosdisk"),
        "/boot/grub/efi.img": _fat_with(_grub("x86_64-efi", label, "fat")),
    }
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident=label, rock_ridge="1.09")
    places = {"": ""}  # of folders and files, by their real names
    with ExitStack() as stack:  # files are read when the whole is written
        for number, (place, content) in enumerate(everything.items()):
            folder, _, own = place.rpartition("/")
            _make_folders(iso, places, folder)
            places[place] = f"{places[folder]}/F{number}.;1"
            if isinstance(content, bytes):
                iso.add_fp(io.BytesIO(content), len(content), places[place], rr_name=own)
            else:
                file = stack.enter_context(content.open("rb"))
                iso.add_fp(file, content.stat().st_size, places[place], rr_name=own)
        iso.add_eltorito(places["/boot/grub/bios.img"], rr_bootcatname="boot.cat",
                         boot_load_size=4, boot_info_table=True)  # fmt: skip
        iso.add_eltorito(places["/boot/grub/efi.img"], efi=True)
        iso.write(str(path))
    iso.close()
    with path.open("ab") as padded:
        padded.write(bytes(PADDING))


def _make_folders(iso: pycdlib.PyCdlib, places: dict[str, str], folder: str) -> None:
    if folder in places:
        return
    above, _, own = folder.rpartition("/")
    _make_folders(iso, places, above)
    places[folder] = f"{places[above]}/D{len(places)}"
    iso.add_directory(places[folder], rr_name=own)


def _grub(platform: str, label: str, *modules: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        made, early = Path(name) / "grub", Path(name) / "early.cfg"
        early.write_text(FIND_THE_CD.format(label=label))
        words = ["grub-mkimage", "-O", platform, "-p", "/boot/grub", "-c", str(early)]
        run_tool([*words, "-o", str(made), *modules, *MODULES])
        return made.read_bytes()


def _fat_with(loader: bytes) -> bytes:
    """A file system in which UEFI finds a loader."""
    with tempfile.TemporaryDirectory() as name:
        fat = Path(name) / "fat"
        run_tool(["mkfs.vfat", "-C", "-F", "12", str(fat), str(FAT_KIB)])
        run_tool(["mmd", "-i", str(fat), "::/EFI", "::/EFI/BOOT"])
        run_tool(["mcopy", "-i", str(fat), "-", "::/EFI/BOOT/BOOTX64.EFI"], loader)
        return fat.read_bytes()
