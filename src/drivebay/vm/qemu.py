"""Which QEMU runs a machine, what it can, and what each version of it calls things.

Context: any. Asks the binary about itself (``qemu_probe``); starts no machine.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivebay.errors import NotFound
from drivebay.vm.packages import install_command
from drivebay.vm.places import cache_folder, remember
from drivebay.vm.qemu_probe import probe

__all__ = ["FEATURES", "Qemu", "Version", "find_qemu"]

BINARY = "qemu-system-x86_64"
MEMORY = "qemu.json"
ELSEWHERE = ["/usr/libexec/qemu-kvm"]  # Red Hat's family keeps it from PATH

Version = tuple[int, int]

# Options that changed their name: the first entry whose version is not above the binary's.
BY_VERSION: dict[str, list[tuple[Version, str]]] = {
    "reconnect": [((9, 2), "reconnect-ms=1000"), ((0, 0), "reconnect=1")],
}

# feature: what an error calls it, the part (vm.packages) that brings it, and since which version.
FEATURES: dict[str, tuple[str, str, Version]] = {
    "vhost-user-blk": ("the device vhost-user-blk", "qemu", (0, 0)),
    "vhost-user-fs": ("the device vhost-user-fs", "qemu", (0, 0)),
    "vhost-user-block-driver": (
        "the block driver virtio-blk-vhost-user (of libblkio)",
        "qemu-blkio",
        (10, 0),  # Debian and Ubuntu build it since then
    ),
    "user-net": ("QEMU's user network (built with libslirp)", "qemu", (0, 0)),
    "e1000": ("the device e1000", "qemu", (0, 0)),
    "nvme": ("the device nvme", "qemu", (0, 0)),
    "ahci": ("the device ich9-ahci", "qemu", (0, 0)),
    "scsi": ("the device virtio-scsi", "qemu", (0, 0)),
    "seccomp": ("QEMU's sandbox (built with seccomp)", "qemu", (0, 0)),
    "memfd": ("guest memory in a memfd", "qemu", (0, 0)),
    "tcg": ("emulation of the processor (TCG)", "qemu", (0, 0)),
    "kvm": ("KVM in QEMU", "qemu", (0, 0)),
}


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary and what it can do."""

    path: Path
    version: Version
    features: frozenset[str] = frozenset()
    machines: tuple[str, ...] = ()  # the versioned kinds of pc-q35
    machine: str = ""  # the newest of them: what a new VM is

    def option(self, name: str) -> str:
        """Return the words for ``name`` in this version."""
        return next(words for since, words in BY_VERSION[name] if since <= self.version)

    def require(self, feature: str, what: str) -> None:
        """Raises: NotFound when it lacks ``feature``, which ``what`` needs."""
        if feature in self.features:
            return
        need, part, since = FEATURES[feature]
        raise NotFound(
            f"{what} needs {need}, which '{self.path}' (QEMU {self.spelled_version}) does not have",
            hint=mend_for(part if since <= self.version else None),
        )

    @property
    def spelled_version(self) -> str:
        return ".".join(map(str, self.version))


def find_qemu(name: str | None = None) -> Qemu:
    """Return a QEMU: the one that is named, else $DRIVEBAY_QEMU, else the first that is there.

    What it can is asked once, and remembered by path and times of change. Raises: NotFound.
    """
    path = _find_binary(name)
    try:
        # What we ask for belongs to it: a newer Drivebay asks more.
        stamp: list[int | str] = [path.stat().st_mtime_ns, _modules_changed(), *sorted(FEATURES)]
    except OSError as error:
        raise NotFound(f"can't look at '{path}': {error.strerror}") from error
    remembered = _read_memory()
    known = _as_qemu(path, stamp, remembered.get(str(path)))
    if known is not None:
        return known
    found = probe(path)
    remembered[str(path)] = {
        "stamp": stamp,
        "version": found.version,
        "features": sorted(found.features),
        "machines": found.machines,
        "machine": found.machine,
    }
    remember(MEMORY, json.dumps(remembered))
    return Qemu(path, found.version, found.features, found.machines, found.machine)


def _find_binary(name: str | None) -> Path:
    wanted = name or os.environ.get("DRIVEBAY_QEMU")
    for candidate in [wanted] if wanted else [BINARY, *ELSEWHERE]:
        found = shutil.which(candidate)
        if found is not None:
            return Path(found).resolve()
    if not wanted:
        raise NotFound(f"{BINARY} is not installed", hint=mend_for("qemu"))
    source = "" if name else ", which DRIVEBAY_QEMU names,"
    if Path(wanted).is_file():
        raise NotFound(f"'{wanted}'{source} is not a program", hint=f"ls -l {wanted}")
    raise NotFound(
        f"there is no QEMU '{wanted}'{source}", hint="name the program's path with --qemu PATH"
    )


def _modules_changed() -> int:
    """When a part of QEMU was last installed: parts are modules in a folder of theirs."""
    folders = [Path(os.environ.get("QEMU_MODULE_DIR", "/usr/lib64/qemu"))]
    folders += Path("/usr/lib").glob("*-linux-gnu/qemu")
    return max((folder.stat().st_mtime_ns for folder in folders if folder.is_dir()), default=0)


def mend_for(part: str | None) -> str:
    """What installs a part of QEMU here, or else the way to another QEMU."""
    other = "name another, newer QEMU: --qemu PATH, or DRIVEBAY_QEMU=PATH for all VMs"
    command = None if part is None else install_command(part)
    return other if command is None else f"{command}; or {other}"


def _read_memory() -> dict[str, Any]:
    try:
        remembered = json.loads((cache_folder() / MEMORY).read_text())
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _as_qemu(path: Path, stamp: list[int | str], saved: Any) -> Qemu | None:
    try:
        if saved["stamp"] != stamp:
            return None
        return Qemu(
            path,
            (int(saved["version"][0]), int(saved["version"][1])),
            frozenset(map(str, saved["features"])),
            tuple(map(str, saved["machines"])),
            str(saved["machine"]),
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return None
