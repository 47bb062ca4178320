"""QEMU's command line: what a machine is made of, and what each version of QEMU calls it.

Context: any. Builds lists of words and asks the binary for its version; starts no machine
(``machine`` does).

Guest memory is always one shared memfd of exactly the machine's size, so that the target
can map it and no size can disagree. Disks are vhost-user-blk with the legacy interface
off: firmware would take that one, and vhost-user targets refuse it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drivebay.errors import NotFound, UsageError
from drivebay.vm.kvm import Accelerator
from drivebay.vm.places import cache_dir

__all__ = ["Disk", "MachineSpec", "Qemu", "command_line", "find_qemu"]

BINARY = "qemu-system-x86_64"
VERSION_SECONDS = 20

Version = tuple[int, int]

TRACKS_WRITES_OF_TCG = (9, 0)

# Options that changed their name: the first entry whose version is not above the binary's.
BY_VERSION: dict[str, list[tuple[Version, str]]] = {
    "reconnect": [((9, 2), "reconnect-ms=1000"), ((0, 0), "reconnect=1")],
}


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary and what it can do."""

    path: Path
    version: Version

    def option(self, name: str) -> str:
        """Return the words for ``name`` in this version."""
        return next(words for since, words in BY_VERSION[name] if since <= self.version)


@dataclass(frozen=True)
class Disk:
    """A disk of the machine: the controller's socket, and how many queues the guest gets."""

    socket: Path
    queues: int = 1
    packed: bool = False  # offer the guest packed rings, if the controller has them


@dataclass(frozen=True)
class MachineSpec:
    """What the caller wants; everything else is the same for each machine."""

    disks: Sequence[Disk]
    cpus: int = 2
    memory_mib: int = 256
    awaits_migration: bool = False  # it runs nothing until another machine is moved into it


@dataclass(frozen=True)
class MachineFiles:
    """Where the pieces of one machine lie; sockets are made by QEMU, in a folder of its own."""

    kernel: Path
    initrd: Path
    console_socket: Path
    command_socket: Path
    monitor_socket: Path


def find_qemu() -> Qemu:
    """Return the QEMU on PATH; its version is remembered by path and modification time."""
    found = shutil.which(BINARY)
    if found is None:
        raise NotFound(
            f"{BINARY} is not installed",
            hint="sudo apt-get install --no-install-recommends qemu-system-x86",
        )
    path = Path(found).resolve()
    key = f"{path} {path.stat().st_mtime_ns}"
    memory = cache_dir() / "qemu.json"
    try:
        saved = json.loads(memory.read_text())
        if saved["key"] == key:
            return Qemu(path, (int(saved["version"][0]), int(saved["version"][1])))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        memory.unlink(missing_ok=True)
    version = _ask_version(path)
    memory.write_text(json.dumps({"key": key, "version": version}))
    return Qemu(path, version)


def _ask_version(path: Path) -> Version:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"{path} does not run: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if match is None:
        raise NotFound(f"{path} --version names no version: {done.stdout[:80]!r}")
    return int(match.group(1)), int(match.group(2))


def command_line(
    qemu: Qemu, accelerator: Accelerator, spec: MachineSpec, files: MachineFiles, console_fd: int
) -> list[str]:
    """Return the words that start the machine.

    ``console_fd`` is inherited by QEMU and takes a copy of all that the guest prints.
    """
    line = [str(qemu.path), "-name", "drivebay-guest"]
    line += ["-nodefaults", "-no-user-config", "-display", "none"]
    line += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"]
    line += ["-accel", accelerator.name]
    line += ["-machine", "q35,memory-backend=memory", "-cpu", "max"]
    memory = _memory_size(qemu, accelerator, spec)
    line += ["-smp", str(spec.cpus), "-m", memory]
    line += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on"]
    line += ["-add-fd", f"fd={console_fd},set=1"]
    for name, socket, extra in (
        ("console", files.console_socket, ",logfile=/dev/fdset/1,logappend=on"),
        ("commands", files.command_socket, ""),
    ):
        path = _quoted(socket)
        line += ["-chardev", f"socket,id={name},path={path},server=on,wait=off{extra}"]
        line += ["-serial", f"chardev:{name}"]
    for number, disk in enumerate(spec.disks):
        reconnect = qemu.option("reconnect")
        line += ["-chardev", f"socket,id=disk{number},path={_quoted(disk.socket)},{reconnect}"]
        device = f"vhost-user-blk-pci,id=vd{number},chardev=disk{number},disable-legacy=on"
        packed = ",packed=on" if disk.packed else ""
        line += ["-device", f"{device},num-queues={disk.queues}{packed}"]
    line += ["-kernel", str(files.kernel), "-initrd", str(files.initrd)]
    line += ["-append", "console=ttyS0 quiet panic=-1"]
    line += ["-qmp", f"unix:{_quoted(files.monitor_socket)},server=on,wait=off"]
    if spec.awaits_migration:
        line += ["-incoming", "defer"]
    return line


def _memory_size(qemu: Qemu, accelerator: Accelerator, spec: MachineSpec) -> str:
    """The machine's memory as QEMU wants it said.

    While a guest moves, emulation in QEMU before 9.0 forgets writes to memory whose size is a
    multiple of 64 pages: the guest arrives broken. A little more memory is without that fault.
    """
    if accelerator.name == "tcg" and qemu.version < TRACKS_WRITES_OF_TCG:
        return f"{spec.memory_mib * 1024 + 8}K"
    return f"{spec.memory_mib}M"


def _quoted(path: Path) -> str:
    """A comma separates QEMU's options, and is doubled to mean itself."""
    text = str(path)
    if len(text.encode()) > 107:
        raise UsageError(
            f"socket path '{text}' has {len(text.encode())} bytes, the kernel takes at most 107",
            hint="use a folder with a shorter name, for instance below /tmp",
        )
    return text.replace(",", ",,")
