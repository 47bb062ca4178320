"""An ISO with Debian's installer, made of Debian's own kernel and initrd for network boots.

Its first question, the language, needs no network. The package is downloaded and unpacked but
never installed; the ISO is kept below the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from pathlib import Path
from typing import Final

from drivebay.vm.guest_image import unpack_packages
from drivebay.vm.places import cache_dir
from tests.e2e import bootable_iso

PACKAGE: Final = "debian-installer-12-netboot-amd64"
INSIDE: Final = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64"
KERNEL: Final = "/install.amd/vmlinuz"
INITRD: Final = "/install.amd/initrd.gz"
WORDS: Final = "--- quiet"
FIRST_QUESTION: Final = "Select a language"


def installer_iso() -> Path:
    """Return the ISO, which nobody may change; made when there is none of this recipe.

    That takes some seconds. Booted by either firmware, a machine with 1 GiB asks for its language
    on the screen; one with 512 MiB complains of its memory instead.
    """
    home = cache_dir() / "debian-installer"
    home.mkdir(exist_ok=True)
    path = home / f"{_recipe()}.iso"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in home.glob("*.iso"):
                left.unlink()
            with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as name:
                made = _make(Path(name))
                made.chmod(0o444)
                made.rename(path)
    return path


def _make(work: Path) -> Path:
    found = unpack_packages(work, [PACKAGE]) / INSIDE
    files = {KERNEL: found / "linux", INITRD: found / "initrd.gz"}
    path = work / "installer.iso"
    bootable_iso.write_iso(path, "DEBIAN12", files, KERNEL, INITRD, WORDS)
    return path


def _recipe() -> str:
    text = Path(__file__).read_bytes() + Path(bootable_iso.__file__).read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]
