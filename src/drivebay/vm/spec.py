"""What a VM is, as the tool works with it; `spec_file` reads and writes it as vm.toml.

Context: any; looks at no file.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from drivebay.errors import UsageError

__all__ = [
    "BUSES",
    "DHCP",
    "NET_KINDS",
    "NIC_MODELS",
    "SSH_PORT",
    "Boot",
    "CloudInit",
    "DiskSpec",
    "Forward",
    "NetSpec",
    "ShareSpec",
    "VmSpec",
    "VncSpec",
    "check_vm_name",
    "read_forward",
]

BUSES: Final = ("virtio", "scsi", "nvme", "sata")
DHCP: Final = "dhcp"
SSH_PORT: Final = 22

NET_KINDS: Final = ("user", "network", "bridge", "tap")
NIC_MODELS: Final = ("virtio", "e1000")

# A name is a host name (RFC 1123), a folder's and a part of socket names: 63 letters at most,
# and less, since a controller's socket carries it beside the disk's name.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,38}[A-Za-z0-9])?", re.ASCII)

_FORWARD = re.compile(
    r"((?P<protocol>tcp|udp):)?((?P<host>[0-9.]+):)?(?P<host_port>\d{1,5})"
    r":((?P<guest>[0-9.]+):)?(?P<guest_port>\d{1,5})",
    re.ASCII,
)


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    host_port: int
    guest_port: int
    host_address: str = "127.0.0.1"
    guest_address: str = ""  # empty: the interface's
    protocol: str = "tcp"

    @property
    def outside(self) -> tuple[str, int]:
        """What it takes of the host: a TCP port and a UDP port of one number are two."""
        return self.protocol, self.host_port

    @property
    def leads_to_ssh(self) -> bool:
        return self.protocol == "tcp" and self.guest_port == SSH_PORT

    def __str__(self) -> str:
        before = "" if self.protocol == "tcp" else f"{self.protocol}:"
        guest = f"{self.guest_address}:" if self.guest_address else ""
        return f"{before}{self.host_address}:{self.host_port}:{guest}{self.guest_port}"


@dataclass(frozen=True)
class DiskSpec:
    """A disk: a bdev of the target, or a qcow2 overlay in the VM's folder that QEMU serves."""

    name: str  # the guest sees it as the serial number
    bdev: str | None = None
    overlay: str | None = None
    made: bool = False  # by us and for this VM alone
    shared: bool = False
    bus: str | None = None  # None: the VM's


@dataclass(frozen=True)
class NetSpec:
    """A network interface."""

    kind: str  # one of NET_KINDS
    mac: str
    forward: tuple[Forward, ...] = ()
    address: str = DHCP  # or ADDRESS/PREFIX, which cloud-init sets
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    model: str = "virtio"
    network: str | None = None  # of kind 'network': the name of one of ours
    bridge: str | None = None  # of kind 'bridge': one that others made
    restrict: bool = False  # of kind 'user': the guest reaches nothing, and forwards still lead in
    subnet: str | None = None  # None: QEMU's own
    dhcp_start: str | None = None
    ifname: str | None = None  # of kind 'tap': the host's interface
    script: str | None = None  # run before QEMU, and the other one after its end
    downscript: str | None = None


@dataclass(frozen=True)
class ShareSpec:
    """A folder of the host that the guest mounts by its tag (virtiofs)."""

    directory: str
    tag: str
    read_only: bool = False


@dataclass(frozen=True)
class CloudInit:
    """What the guest's cloud-init is told."""

    instance_id: str
    hostname: str
    user: str = "drivebay"
    ssh_keys: tuple[str, ...] = ()  # beside the VM's own key
    password_hash: str | None = None  # crypt(5), of `user`
    packages: tuple[str, ...] = ()
    user_data: str | None = None  # a file whose content is used in place of ours


@dataclass(frozen=True)
class Boot:
    """A kernel that QEMU starts itself, instead of the firmware and the system disk."""

    kernel: str
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True)
class VncSpec:
    """A port of this host for VNC programs."""

    address: str
    port: int
    password_file: str | None = None
    tls: str | None = None  # the folder of its certificates


@dataclass(frozen=True)
class VmSpec:
    """One VM. ``name`` is its folder's, all else stands in vm.toml."""

    name: str
    uuid: str
    machine: str  # QEMU's machine type, pinned so that the guest's hardware stays the same
    memory: int  # bytes
    cpus: int
    firmware: str = "bios"
    bus: str = "virtio"
    image: str | None = None
    iso: str | None = None  # the file in its CD drive, from which an empty disk is installed
    autostart: bool = False  # with the host
    lab: str | None = None  # whose file says what it is
    qemu: str | None = None
    qemu_args: tuple[str, ...] = ()
    boot: Boot | None = None
    disks: tuple[DiskSpec, ...] = ()
    nets: tuple[NetSpec, ...] = ()
    shares: tuple[ShareSpec, ...] = ()
    vnc: VncSpec | None = None
    cloud_init: CloudInit | None = None

    def disk(self, name: str) -> DiskSpec | None:
        """The disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)

    def bus_of(self, disk: DiskSpec) -> str:
        """The bus on which the guest sees a disk."""
        return disk.bus or self.bus


def check_vm_name(name: str) -> None:
    """Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name[:80]}' can't be the name of a VM: 1 to 40 letters, digits and '-', "
            "and no '-' at either end",
            hint="the guest gets it as its host name",
        )


def read_forward(text: str) -> Forward:
    """Read '[udp:][ADDRESS:]HOSTPORT:[GUESTADDRESS:]GUESTPORT'. Raises: UsageError.

    >>> str(read_forward("2222:22"))
    '127.0.0.1:2222:22'
    """
    found = _FORWARD.fullmatch(text)
    if found is None or not (_is_port(found["host_port"]) and _is_port(found["guest_port"])):
        raise UsageError(
            f"'{text[:80]}' is no port forward",
            hint="write HOSTPORT:GUESTPORT, such as 2222:22; both are from 1 to 65535",
        )
    for address in filter(None, (found["host"], found["guest"])):
        if not _is_address(address):
            raise UsageError(f"'{address[:80]}' in the forward '{text[:80]}' is no IPv4 address")
    return Forward(
        int(found["host_port"]),
        int(found["guest_port"]),
        found["host"] or "127.0.0.1",
        found["guest"] or "",
        found["protocol"] or "tcp",
    )


def _is_port(text: str) -> bool:
    return 1 <= int(text) <= 65535


def _is_address(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
