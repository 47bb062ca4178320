"""Which package holds a program or a part of it, as a command for this host's distribution.

Context: any; reads /etc/os-release. Only a mend is made of it: what is there is found out by
trying it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Final

__all__ = [
    "DISTRIBUTIONS",
    "PARTS",
    "everywhere",
    "install_command",
    "package_of",
    "this_distribution",
]

DISTRIBUTIONS: Final = {
    "debian": "Debian",
    "ubuntu": "Ubuntu",
    "fedora": "Fedora",
    "openeuler": "openEuler",
}

# part: its package by distribution. Where there is none, the distribution has no such package.
PARTS: Final[dict[str, dict[str, str]]] = {
    "qemu": {
        "debian": "qemu-system-x86",
        "ubuntu": "qemu-system-x86",
        "fedora": "qemu-system-x86",
        "openeuler": "qemu",
    },
    # QEMU's block drivers over libblkio: Debian 13, Ubuntu 25.10, Fedora 38 and later.
    "qemu-blkio": {
        "debian": "qemu-block-extra",
        "ubuntu": "qemu-block-extra",
        "fedora": "qemu-block-blkio",
    },
    "qemu-img": {
        "debian": "qemu-utils",
        "ubuntu": "qemu-utils",
        "fedora": "qemu-img",
        "openeuler": "qemu-img",
    },
    "ovmf": {
        "debian": "ovmf",
        "ubuntu": "ovmf",
        "fedora": "edk2-ovmf",
        "openeuler": "edk2-ovmf",
    },
    "ssh": {
        "debian": "openssh-client",
        "ubuntu": "openssh-client",
        "fedora": "openssh-clients",
        "openeuler": "openssh-clients",
    },
    # Where there is none yet (Debian 12, Ubuntu 22.04) QEMU's own package holds the older one.
    "virtiofsd": dict.fromkeys(("debian", "ubuntu", "fedora", "openeuler"), "virtiofsd"),
    "mmdebstrap": {"debian": "mmdebstrap", "ubuntu": "mmdebstrap", "fedora": "mmdebstrap"},
    "grub-bios": {
        "debian": "grub-common grub-pc-bin",
        "ubuntu": "grub-common grub-pc-bin",
        "fedora": "grub2-tools grub2-pc-modules",
        "openeuler": "grub2-tools grub2-pc-modules",
    },
    "grub-uefi": {
        "debian": "grub-common grub-efi-amd64-bin",
        "ubuntu": "grub-common grub-efi-amd64-bin",
        "fedora": "grub2-tools grub2-efi-x64-modules",
        "openeuler": "grub2-tools grub2-efi-x64-modules",
    },
    "novnc": {"debian": "novnc", "ubuntu": "novnc", "fedora": "novnc"},
    "mtools": dict.fromkeys(DISTRIBUTIONS, "mtools"),
    "dosfstools": dict.fromkeys(DISTRIBUTIONS, "dosfstools"),
    "e2fsprogs": dict.fromkeys(DISTRIBUTIONS, "e2fsprogs"),
}

_INSTALL: Final = {
    "debian": "sudo apt-get install --no-install-recommends",
    "ubuntu": "sudo apt-get install --no-install-recommends",
    "fedora": "sudo dnf install",
    "openeuler": "sudo dnf install",
}


def this_distribution(release: Mapping[str, str] | None = None) -> str | None:
    """The distribution of this host, or of which it is a descendant; None for any other."""
    if release is None:
        try:
            release = platform.freedesktop_os_release()
        except OSError:
            return None
    ancestors = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    for name in ancestors:
        known = {"rhel": "fedora", "centos": "fedora"}.get(name.lower(), name.lower())
        if known in DISTRIBUTIONS:
            return known
    return None


def package_of(part: str, distribution: str | None) -> str | None:
    """The package that holds ``part``; None where there is none, or nobody knows."""
    return None if distribution is None else PARTS[part].get(distribution)


def install_command(part: str) -> str | None:
    """The command that installs ``part`` here, or None."""
    distribution = this_distribution()
    package = package_of(part, distribution)
    if distribution is None or package is None:
        return None
    return f"{_INSTALL[distribution]} {package}"


def everywhere(part: str) -> str:
    """The packages that hold ``part``, by distribution.

    >>> everywhere("qemu")
    'qemu-system-x86 (Debian, Ubuntu, Fedora), qemu (openEuler)'
    """
    holders: dict[str, list[str]] = {}
    for distribution, package in PARTS[part].items():
        holders.setdefault(package, []).append(DISTRIBUTIONS[distribution])
    return ", ".join(f"{package} ({', '.join(names)})" for package, names in holders.items())
