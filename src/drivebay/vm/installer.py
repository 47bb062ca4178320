"""An installer's kernel and initrd, taken out of its ISO to be started with a serial console.

Context: a short-lived process; reads files, and writes two. What is on an ISO is a stranger's:
its names are only compared, its sizes are bounded, and whatever pycdlib stumbles over is one
sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from drivebay.disks.sizes import format_size
from drivebay.errors import DrivebayError, HostError, NotFound, UsageError
from drivebay.vm.iso import check_iso, read_label
from drivebay.vm.spec import Boot

if TYPE_CHECKING:
    import pycdlib

__all__ = ["check_installer", "take_out"]

KERNEL_MOST: Final = 128 << 20
INITRD_MOST: Final = 1 << 30
_CHUNK: Final = 1 << 20
# What Python says when pycdlib follows numbers that lead nowhere.
_STUMBLES: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RecursionError, TypeError, ValueError, struct.error),
)
_MAGIC: Final = slice(0x202, 0x206)  # Linux' Documentation/arch/x86/boot.rst: "HdrS"
# What udev leaves as it is in the name of a link by label; all else is written as \xNN.
_LABEL_LETTERS: Final = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789#+-.:=@_"
)


@dataclass(frozen=True)
class _Layout:
    """Where a family of distributions has them, and what its installer has to be told."""

    kernel: str
    initrd: str
    words: str


# What stands behind '---' Debian's and Ubuntu's installers tell the installed system, too
# (installation-guide, 5.3.1); Anaconda does that with any 'console=', and finds the rest of
# itself by the label.
_SERIAL: Final = "console=ttyS0,115200"
_LAYOUTS: Final = (
    _Layout("/install.amd/vmlinuz", "/install.amd/initrd.gz", f"--- {_SERIAL}"),  # Debian
    _Layout("/install/vmlinuz", "/install/initrd.gz", f"--- {_SERIAL}"),  # its live ISOs
    _Layout("/linux", "/initrd.gz", f"--- {_SERIAL}"),  # its mini.iso, for network installations
    _Layout("/casper/vmlinuz", "/casper/initrd", f"--- {_SERIAL}"),  # Ubuntu
    _Layout(  # Fedora, AlmaLinux, openEuler
        "/images/pxeboot/vmlinuz",
        "/images/pxeboot/initrd.img",
        f"inst.stage2=hd:LABEL={{label}} inst.text {_SERIAL}",
    ),
)


def check_installer(iso: Path) -> None:
    """Whether an ISO has an installer that we know. Raises: HostError, NotFound, UsageError."""
    with _opened(iso) as disc:
        _find_layout(iso, disc)


def take_out(iso: Path, folder: Path) -> Boot:
    """Write an installer's kernel and initrd into ``folder``; return how they are started.

    Raises: HostError, NotFound, UsageError.
    """
    kernel, initrd = folder / "kernel", folder / "initrd"
    with _opened(iso) as disc:
        layout = _find_layout(iso, disc)
        _copy(iso, disc, layout.kernel, kernel, KERNEL_MOST)
        _copy(iso, disc, layout.initrd, initrd, INITRD_MOST)
    with kernel.open("rb") as file:
        if file.read(_MAGIC.stop)[_MAGIC] != b"HdrS":
            raise UsageError(
                f"'{layout.kernel}' on '{iso}' is no Linux for this processor (x86-64)",
                hint="an ISO for amd64, which is also called x86_64, is needed",
            )
    return Boot(str(kernel), str(initrd), layout.words.format(label=_spelled(read_label(iso))))


def _spelled(label: bytes) -> str:
    return "".join(chr(byte) if byte in _LABEL_LETTERS else f"\\x{byte:02x}" for byte in label)


# ---- on the ISO ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(iso: Path) -> Iterator[pycdlib.PyCdlib]:
    check_iso(iso, spare=0)  # pycdlib would cut short a file that goes on behind the end
    import pycdlib.pycdlibexception  # only here: it takes a moment

    disc = pycdlib.PyCdlib()
    try:
        disc.open(str(iso))
        try:
            yield disc
        finally:
            disc.close()
    except DrivebayError:
        raise
    except OSError as error:
        raise HostError(
            f"can't take an installer out of '{iso}'", error.errno or errno.EIO, path=str(iso)
        ) from error
    except (pycdlib.pycdlibexception.PyCdlibException, *_STUMBLES) as error:
        raise UsageError(
            f"'{iso}' is broken, or made in an unusual way: {str(error)[:200] or repr(error)}",
            hint="compare its checksum; or start it without --text",
        ) from error


def _find_layout(iso: Path, disc: pycdlib.PyCdlib) -> _Layout:
    for layout in _LAYOUTS:
        if all(_find(disc, path) is not None for path in (layout.kernel, layout.initrd)):
            return layout
    known = ", ".join(layout.kernel for layout in _LAYOUTS)
    raise NotFound(
        f"'{iso}' has no installer's kernel where Debian, Ubuntu, Fedora or openEuler put it "
        f"({known})",
        hint="start it without --text, and use its screen: drivebay vm screen NAME",
    )


def _find(disc: pycdlib.PyCdlib, path: str) -> dict[str, str] | None:
    """pycdlib's words for a file of that name, by the names that are most as they were."""
    from pycdlib.pycdlibexception import PyCdlibInvalidInput

    for words in _spellings(disc, path):
        with contextlib.suppress(PyCdlibInvalidInput):  # which says that there is none
            record = disc.get_record(**words)
            if record.is_file() and record.get_data_length() > 0:  # a link has no content
                return words
    return None


def _spellings(disc: pycdlib.PyCdlib, path: str) -> Iterator[dict[str, str]]:
    if disc.has_rock_ridge():
        yield {"rr_path": path}
    if disc.has_joliet():
        yield {"joliet_path": path}
    folder, _, name = path.upper().rpartition("/")
    version = ";1" if "." in name else ".;1"
    for above in dict.fromkeys((folder, folder.replace(".", "_"))):
        yield {"iso_path": f"{above}/{name}{version}"}


def _copy(iso: Path, disc: pycdlib.PyCdlib, path: str, to: Path, most: int) -> None:
    words = _find(disc, path)
    assert words is not None, "its layout was found"
    with disc.open_file_from_iso(**words) as source, _private(to) as file:
        length = source.length()
        if length > most:
            raise UsageError(
                f"'{path}' on '{iso}' has {format_size(length)}, and an installer's has at most "
                f"{format_size(most)}"
            )
        while chunk := source.read(_CHUNK):
            file.write(chunk)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
