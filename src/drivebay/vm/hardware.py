"""A virtual machine in QEMU's terms: its parts, before any of QEMU's spelling.

Context: any; only values. `command` makes the command line of it, `hotplug` the monitor's
commands for one disk.

A file or socket is a place: a path, or a descriptor that QEMU inherits. The second is how a
QEMU without rights gets what only its starter may open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from drivebay.errors import UsageError
from drivebay.vm.spec import Forward
from drivebay.vm.user_net import UserNet

__all__ = [
    "SPARE_PORTS",
    "Cd",
    "Disk",
    "Drive",
    "Firmware",
    "Hardware",
    "InBridge",
    "Listener",
    "Memory",
    "NamedTap",
    "Nic",
    "OpenTap",
    "OwnNet",
    "Share",
    "Start",
    "Vnc",
    "check_socket_path",
]

SPARE_PORTS: Final = 8  # for disks that are added while the machine runs
SOCKET_PATH_MOST: Final = 107  # of sun_path's 108 bytes, the last is zero


@dataclass(frozen=True)
class Listener:
    """A socket that QEMU serves: at a path, or one that listens already; and its log's path."""

    place: Path | int
    log: str | None = None


@dataclass(frozen=True)
class Disk:
    """A disk behind a controller's vhost-user socket.

    ``bus`` 'virtio' hands the guest's rings to the target; on the others QEMU emulates the
    device, and is itself the target's client.
    """

    socket: Path
    queues: int = 1
    packed: bool = False  # offer the guest packed rings, if the controller has them
    name: str = ""
    bus: str = "virtio"
    boot_order: int | None = None


@dataclass(frozen=True)
class Drive:
    """A disk that QEMU serves by itself: a qcow2 overlay on an image, or the seed."""

    name: str
    path: str
    format: str = "raw"
    backing: str | None = None
    read_only: bool = False
    bus: str = "virtio"
    boot_order: int | None = None


@dataclass(frozen=True)
class Cd:
    """A CD drive, and the ISO in it."""

    path: str
    boot_order: int | None = None


@dataclass(frozen=True)
class OwnNet:
    """QEMU's own network, behind the host's address."""

    forward: Sequence[Forward] = ()
    address: str = ""  # to which forwards lead; empty: the one that QEMU's DHCP gives
    restrict: bool = False
    addresses: UserNet | None = None  # None: as QEMU chooses them


@dataclass(frozen=True)
class OpenTap:
    """A TAP that was opened for QEMU: a descriptor for each queue, and the kernel's for each."""

    descriptors: Sequence[int]
    vhost: Sequence[int] = ()


@dataclass(frozen=True)
class InBridge:
    """A TAP in a bridge, which QEMU has its set-uid helper make: as somebody would type it."""

    bridge: str


@dataclass(frozen=True)
class NamedTap:
    """A TAP that QEMU opens by name, and scripts that it runs: as somebody would type it."""

    ifname: str
    script: str | None = None
    downscript: str | None = None


@dataclass(frozen=True)
class Nic:
    """An interface, and what is behind it."""

    mac: str
    behind: OwnNet | OpenTap | InBridge | NamedTap = OwnNet()
    model: str = "virtio"


@dataclass(frozen=True)
class Share:
    """A folder of the host behind a virtiofsd's vhost-user socket, or a connection to it."""

    tag: str
    place: Path | int
    directory: str
    read_only: bool = False


@dataclass(frozen=True)
class Start:
    """A kernel that QEMU starts itself."""

    kernel: str
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True)
class Vnc:
    """A port at which the screen is served; ``password`` is a file, ``tls`` a folder."""

    address: str
    port: int
    password: str | None = None
    tls: str | None = None


@dataclass(frozen=True)
class Firmware:
    """UEFI: its code, and the variables of this machine."""

    code: str
    variables: str


@dataclass(frozen=True)
class Memory:
    """One shared memfd of exactly this size; ``node`` is where the host shall take it from."""

    kib: int
    node: int | None = None
    huge_pages: bool = False


@dataclass(frozen=True)
class Hardware:
    """What the caller wants; everything else is the same for each machine."""

    name: str
    memory: Memory
    monitor: Listener
    serials: Sequence[tuple[str, Listener]]
    cpus: int = 2
    machine: str = "q35"
    uuid: str | None = None
    disks: Sequence[Disk | Drive] = ()
    cd: Cd | None = None
    nics: Sequence[Nic] = ()
    shares: Sequence[Share] = ()
    agent: Listener | None = None
    screen: bool = False  # a VGA card, and a pointer that knows where on it it stands
    vnc: Vnc | None = None  # beside what is handed in over the monitor
    start: Start | None = None
    firmware: Firmware | None = None
    ends_at_reboot: bool = False
    awaits_migration: bool = False  # it runs nothing until another machine is moved into it
    ports: int = 0  # PCIe root ports beyond those of the disks
    more: Sequence[str] = ()
    files: Sequence[tuple[int, int]] = field(default=())  # (descriptor, fdset) to open by


def check_socket_path(path: Path) -> None:
    """Raises: UsageError for one that the kernel would cut."""
    length = len(str(path).encode())
    if length > SOCKET_PATH_MOST:
        raise UsageError(
            f"socket path '{path}' has {length} bytes, the kernel takes at most {SOCKET_PATH_MOST}",
            hint="use a folder with a shorter name, for instance below /tmp",
        )
