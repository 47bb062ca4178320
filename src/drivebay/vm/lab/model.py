"""What a lab's file says, as the other modules of this folder work with it.

Context: any; looks at nothing. `reading` makes it, once every mistake that the file alone can
show is ruled out. A thing is called in the world as its lab and its name together, so that two
labs may use the same names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

from drivebay.errors import UsageError
from drivebay.vm.lab.lines import Place
from drivebay.vm.spec import Boot, NetSpec, ShareSpec

__all__ = [
    "USER_MODE",
    "Lab",
    "LabDisk",
    "LabMistake",
    "LabNet",
    "LabPool",
    "LabVm",
    "Source",
    "VmDisk",
    "network_name",
]


USER_MODE: Final = "user"
_NETWORK_NAME_MOST: Final = 12


def network_name(lab: str, name: str) -> str:
    """LAB-NAME as all else, where that has the 12 letters of a network's name; where it is longer,
    the beginning of NAME and a number that is always the same for this lab and name.

    >>> network_name("four", "lan"), network_name("Development", "lan")
    ('four-lan', 'lan-8630')
    """
    full = f"{lab}-{name}".lower()
    if len(full) <= _NETWORK_NAME_MOST:
        return full
    number = hashlib.sha256(full.encode()).hexdigest()[:4]
    return f"{name.lower()[: _NETWORK_NAME_MOST - 5].strip('-')}-{number}"


class LabMistake(UsageError):
    """What is wrong in a lab's file, with the line."""


@dataclass(frozen=True)
class Source:
    """The file, and on which line of it each thing stands."""

    path: Path
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a thing, or of what it would stand in."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def mistake(self, place: Place, what: str, hint: str | None = None) -> LabMistake:
        """An error that says where."""
        return LabMistake(f"{self.path.name}, line {self.line(place)}: {what}", hint=hint)


@dataclass(frozen=True)
class LabPool:
    """A pool in a file, or on a device."""

    name: str
    place: Place
    file: Path | None = None
    device: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class LabDisk:
    """One disk: in a pool, on a file or device, or a part of another disk."""

    name: str  # data-1
    group: str  # data: the table that it comes from
    place: Place
    size: int | None = None
    pool: str | None = None  # None with neither file nor base: the pool 'default' of this user
    file: Path | None = None
    base: str | None = None  # the disk of which it is a part
    part: int = 0  # from 0 on
    parts: int = 0

    @property
    def in_pool(self) -> bool:
        return self.file is None and self.base is None


@dataclass(frozen=True)
class VmDisk:
    """A disk of the lab in a VM."""

    disk: str  # data-1
    name: str  # in the VM: data
    shared: bool = False
    bus: str | None = None


@dataclass(frozen=True)
class LabNet:
    """What VMs join: QEMU's own network (mode "user"), a network that `up` makes, or one of this
    host that is there already.
    """

    name: str
    place: Place
    mode: str = USER_MODE
    subnet: IPv4Network | None = None  # of one that is made; None: a free one
    uplink: str | None = None
    mtu: int | None = None
    network: str | None = None  # a named network that is there
    bridge: str | None = None  # a bridge that others made

    @property
    def is_made(self) -> bool:
        """Whether `up` makes it, and `down --delete` removes it."""
        return self.mode != USER_MODE


@dataclass(frozen=True)
class LabVm:
    """One VM. None means that the file does not say it: a new VM gets what `vm create` gives,
    and one that is there keeps what it has.
    """

    name: str  # web-1
    group: str  # web
    place: Place
    memory: int | None = None
    cpus: int | None = None
    image: str | None = None
    iso: Path | None = None
    pool: str | None = None  # of its system disk; None: the pool 'default' of this user
    size: int | None = None  # of its system disk; None: the image's, or no system disk
    disks: tuple[VmDisk, ...] = ()
    nets: tuple[NetSpec, ...] | None = None  # without MAC addresses, which are chosen
    bus: str | None = None
    firmware: str | None = None
    boot: Boot | None = None
    qemu: str | None = None
    qemu_args: tuple[str, ...] | None = None
    shares: tuple[ShareSpec, ...] | None = None
    autostart: bool | None = None
    user: str | None = None
    ssh_keys: tuple[str, ...] | None = None  # the keys themselves
    packages: tuple[str, ...] | None = None
    user_data: Path | None = None

    @property
    def has_system_disk(self) -> bool:
        """Whether a disk is made for it alone, from which it starts."""
        return self.image is not None or self.size is not None


@dataclass(frozen=True)
class Lab:
    """All that one file describes, in the file's order."""

    name: str
    source: Source
    pools: tuple[LabPool, ...] = ()
    disks: tuple[LabDisk, ...] = ()
    nets: tuple[LabNet, ...] = ()
    vms: tuple[LabVm, ...] = ()

    def full(self, name: str) -> str:
        """What a thing of this lab is called in the world."""
        return f"{self.name}-{name}"

    def network_name(self, name: str) -> str:
        """What a network of this lab is called in the world."""
        return network_name(self.name, name)

    def disk(self, name: str) -> LabDisk:
        """The disk of that name, which is there."""
        return next(disk for disk in self.disks if disk.name == name)
