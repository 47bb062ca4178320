"""A virtual machine as a libvirt domain, for those who run their machines with libvirt.

Context: any; text is made, and modes of files are looked at. It is the same machine as `command`
starts, except that libvirt numbers PCI slots itself. What libvirt has no element for stands in
QEMU's own words below <qemu:commandline>: libvirt does not watch over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from drivebay.errors import UsageError
from drivebay.vm.command import Properties, disk_parts, netdev, spelled
from drivebay.vm.hardware import (
    Cd,
    Disk,
    Drive,
    Hardware,
    InBridge,
    Listener,
    Memory,
    NamedTap,
    Nic,
    OwnNet,
    Share,
    Vnc,
)
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu

__all__ = ["Domain", "domain_xml"]

_QEMU: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
ElementTree.register_namespace("qemu", _QEMU)

_KNOWN_BUSES: Final = {"virtio": "vd", "scsi": "sd", "sata": "sd"}  # libvirt has no NVMe device
_LAST_SLOT: Final = 0x1E  # of the root bus; the one behind it is the chipset's
_LAST_SATA: Final = 5
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Domain:
    """``xml`` is what 'virsh define' takes; ``notes`` are sentences for who does that."""

    xml: str
    notes: tuple[str, ...]


def domain_xml(
    qemu: Qemu, accelerator: Accelerator, hardware: Hardware, user: tuple[int, int] | None = None
) -> Domain:
    """Describe a machine; ``user`` (uid, gid) is whose the controllers' sockets are.

    Its places must be paths: a descriptor is nothing to libvirt. Raises: UsageError.
    """
    domain = ElementTree.Element("domain", type="kvm" if accelerator.name == "kvm" else "qemu")
    _add(domain, "name", hardware.name)
    if hardware.uuid is not None:
        _add(domain, "uuid", hardware.uuid)
    _add_memory(domain, hardware.memory)
    _add(domain, "vcpu", str(hardware.cpus))
    if hardware.memory.node is not None:
        tuning = _add(domain, "numatune")
        _add(tuning, "memory", mode="preferred", nodeset=str(hardware.memory.node))
    _add_start(domain, hardware)
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    _add(domain, "cpu", mode="maximum", check="none")
    devices = _add(domain, "devices")
    _add(devices, "emulator", str(qemu.path))
    beyond = _add_devices(devices, qemu, hardware)
    if user is not None:
        label = _add(domain, "seclabel", type="static", model="dac", relabel="no")
        _add(label, "label", f"+{user[0]}:+{user[1]}")
    if beyond.words:
        commandline = ElementTree.SubElement(domain, f"{{{_QEMU}}}commandline")
        for word in beyond.words:
            ElementTree.SubElement(commandline, f"{{{_QEMU}}}arg", value=word)
    _check_texts(domain)
    ElementTree.indent(domain)
    notes = [f"in QEMU's own words: {name}" for name in beyond.names]
    if user is not None:
        closed = [path for path in _opened(hardware) if not _may_read(Path(path), *user)]
        notes += [f"'{path}' can't be read by user {user[0]}, whom QEMU is" for path in closed]
    if hardware.vnc is not None and not _is_open(hardware.vnc):
        notes.append(
            "VNC listens nowhere, since libvirt has its password or certificates elsewhere"
        )
    return Domain(ElementTree.tostring(domain, encoding="unicode"), tuple(notes))


def _opened(hardware: Hardware) -> Iterator[str]:
    """The files that QEMU opens itself, since libvirt hands over none."""
    for disk in hardware.disks:
        if isinstance(disk, Drive):
            yield from filter(None, (disk.path, disk.backing))
    if hardware.cd is not None:
        yield hardware.cd.path
    if hardware.start is not None:
        yield from filter(None, (hardware.start.kernel, hardware.start.initrd))
    if hardware.firmware is not None:
        yield from (hardware.firmware.code, hardware.firmware.variables)


def _may_read(path: Path, uid: int, gid: int) -> bool:
    """By the modes of the file and of the folders above it; one that is not there has none."""
    try:
        found = [(path.stat(), 0o4), *((folder.stat(), 0o1) for folder in path.absolute().parents)]
    except OSError:
        return False
    return all(
        status.st_mode
        & (right << (6 if status.st_uid == uid else 3 if status.st_gid == gid else 0))
        for status, right in found
    )


@dataclass
class _Beyond:
    """Words of QEMU's own, and what they are.

    QEMU makes their devices before libvirt's, which libvirt places from the first slot on: so
    these are placed from the last one down.
    """

    words: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _slots: Iterator[int] = field(default_factory=lambda: iter(range(_LAST_SLOT, 0, -1)))
    _sata: Iterator[int] = field(default_factory=lambda: iter(range(_LAST_SATA, 0, -1)))
    _has_scsi: bool = False

    def add_disk(self, qemu: Qemu, disk: Disk | Drive) -> None:
        for option, properties in disk_parts(qemu, disk, "pcie.0"):
            if option == "device":
                properties |= self._place(disk.bus)
            self.words += [f"-{option}", spelled(properties)]
        self.names.append(f"disk '{disk.name}', since libvirt cannot have it on the bus {disk.bus}")

    def _place(self, bus: str) -> Properties:
        if bus == "sata":
            return {"bus": f"ide.{next(self._sata)}"}
        if bus == "scsi":
            if not self._has_scsi:
                self.words += ["-device", f"virtio-scsi-pci,id=beyond,addr={self._slot()}"]
                self._has_scsi = True
            return {"bus": "beyond.0"}
        return {"addr": self._slot()}

    def _slot(self) -> str:
        return f"{next(self._slots):#x}"

    def add_nic(self, nic: Nic, own: OwnNet, number: int) -> None:
        device: Properties = {
            "driver": "e1000" if nic.model == "e1000" else "virtio-net-pci",
            "netdev": f"beyond{number}",
            "mac": nic.mac,
            "romfile": "",
            "addr": self._slot(),
        }
        self.words += ["-netdev", netdev(nic, f"beyond{number}"), "-device", spelled(device)]
        lacks = [f"forwards no {forward}" for forward in own.forward]
        lacks += ["knows no restrict"] if own.restrict else []
        lacks += [] if own.addresses is None else ["has addresses of its own"]
        self.names.append(
            f"interface {nic.mac}, since libvirt's user network {' and '.join(lacks)}"
        )


def _add(
    parent: ElementTree.Element, tag: str, text: str | None = None, /, **attributes: str
) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _check_texts(domain: ElementTree.Element) -> None:
    for element in domain.iter():
        for text in (element.text or "", *element.attrib.values()):
            found = _NOT_XML.search(text)
            if found is not None:
                raise UsageError(
                    f"{text[:80]!r} holds the character {found[0]!r}, which no XML can"
                )


def _add_memory(domain: ElementTree.Element, memory: Memory) -> None:
    _add(domain, "memory", str(memory.kib), unit="KiB")
    backing = _add(domain, "memoryBacking")
    if memory.huge_pages:
        pages = _add(backing, "hugepages")
        _add(pages, "page", size="2", unit="MiB")
    _add(backing, "source", type="memfd")
    _add(backing, "access", mode="shared")


def _add_start(domain: ElementTree.Element, hardware: Hardware) -> None:
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine=hardware.machine)
    if hardware.firmware is not None:
        _add(system, "loader", hardware.firmware.code, readonly="yes", type="pflash")
        _add(system, "nvram", hardware.firmware.variables)
    if hardware.start is not None:
        _add(system, "kernel", hardware.start.kernel)
        if hardware.start.initrd is not None:
            _add(system, "initrd", hardware.start.initrd)
        if hardware.start.append:
            _add(system, "cmdline", hardware.start.append)


def _add_devices(devices: ElementTree.Element, qemu: Qemu, hardware: Hardware) -> _Beyond:
    """Returns: what libvirt has no element for."""
    beyond = _Beyond()
    names = {prefix: iter(_letters(prefix)) for prefix in set(_KNOWN_BUSES.values())}
    bootable = [*hardware.disks, *([] if hardware.cd is None else [hardware.cd])]
    starting = sorted({each.boot_order for each in bootable if each.boot_order is not None})
    for disk in hardware.disks:
        if disk.bus not in _KNOWN_BUSES or (isinstance(disk, Disk) and disk.bus != "virtio"):
            beyond.add_disk(qemu, disk)
            continue
        element = _add_disk(devices, disk, next(names[_KNOWN_BUSES[disk.bus]]))
        if disk.boot_order is not None:
            _add(element, "boot", order=str(starting.index(disk.boot_order) + 1))
    if hardware.cd is not None:
        element = _add_cd(devices, hardware.cd, next(names[_KNOWN_BUSES["sata"]]))
        if hardware.cd.boot_order is not None:
            _add(element, "boot", order=str(starting.index(hardware.cd.boot_order) + 1))
    _add_screen(devices, hardware)
    for number, nic in enumerate(hardware.nics):
        own = nic.behind
        if isinstance(own, OwnNet) and (own.forward or own.restrict or own.addresses is not None):
            beyond.add_nic(nic, own, number)
        else:
            _add_interface(devices, nic)
    for share in hardware.shares:
        _add_share(devices, share)
    for _, listener in hardware.serials:
        _add_serial(devices, listener)
    if hardware.agent is not None:
        channel = _add(devices, "channel", type="unix")
        _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    _add(devices, "memballoon", model="none")
    if hardware.more:
        beyond.words += hardware.more
        beyond.names.append(f"qemu_args: {' '.join(hardware.more)}")
    return beyond


def _add_interface(devices: ElementTree.Element, nic: Nic) -> None:
    """libvirt makes a TAP itself, as root, and opens one that is there by its name."""
    match nic.behind:
        case InBridge(bridge):
            interface = _add(devices, "interface", type="bridge")
            _add(interface, "mac", address=nic.mac)
            _add(interface, "source", bridge=bridge)
        case NamedTap(ifname, script, downscript):
            interface = _add(devices, "interface", type="ethernet")
            _add(interface, "mac", address=nic.mac)
            there = {} if script else {"managed": "no"}
            _add(interface, "target", dev=ifname, **there)
            if script:
                _add(interface, "script", path=script)
            if downscript:
                _add(interface, "downscript", path=downscript)
        case _:
            interface = _add(devices, "interface", type="user")
            _add(interface, "mac", address=nic.mac)
    _add(interface, "model", type=nic.model)


def _letters(prefix: str) -> Sequence[str]:
    """Names for 26 * 27 disks, in libvirt's order: vda to vdz, vdaa to vdzz."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return [f"{prefix}{first}{last}" for first in ("", *alphabet) for last in alphabet]


def _add_disk(devices: ElementTree.Element, disk: Disk | Drive, name: str) -> ElementTree.Element:
    if isinstance(disk, Disk):
        element = _add(devices, "disk", type="vhostuser", device="disk")
        _add(element, "driver", name="qemu", type="raw", queues=str(disk.queues))
        source = _add(element, "source", type="unix", path=str(disk.socket))
        _add(source, "reconnect", enabled="yes", timeout="1")
        _add(element, "target", dev=name, bus=disk.bus)
        return element  # its serial number is the controller's
    element = _add(devices, "disk", type="file", device="disk")
    _add(element, "driver", name="qemu", type=disk.format, discard="unmap")
    _add(element, "source", file=disk.path)
    if disk.backing is not None:
        below = _add(element, "backingStore", type="file")
        _add(below, "format", type="raw")
        _add(below, "source", file=disk.backing)
    _add(element, "target", dev=name, bus=disk.bus)
    if disk.read_only:
        _add(element, "readonly")
    _add(element, "serial", disk.name)
    return element


def _add_screen(devices: ElementTree.Element, hardware: Hardware) -> None:
    """VNC that listens nowhere: 'virt-viewer --attach' is handed a connection."""
    if not hardware.screen:
        _add(devices, "controller", type="usb", model="none")
        return
    _add(devices, "controller", type="usb", model="qemu-xhci")
    _add(devices, "input", type="tablet", bus="usb")
    if hardware.vnc is None or not _is_open(hardware.vnc):
        _add(_add(devices, "graphics", type="vnc"), "listen", type="none")
    else:
        port = _add(devices, "graphics", type="vnc", port=str(hardware.vnc.port))
        _add(port, "listen", type="address", address=hardware.vnc.address)
    _add(_add(devices, "video"), "model", type="vga")


def _add_share(devices: ElementTree.Element, share: Share) -> None:
    """libvirt starts a virtiofsd itself; a version that can't keep it read-only refuses that."""
    element = _add(devices, "filesystem", type="mount", accessmode="passthrough")
    _add(element, "driver", type="virtiofs", queue="1024")
    _add(element, "source", dir=share.directory)
    _add(element, "target", dir=share.tag)
    if share.read_only:
        _add(element, "readonly")


def _add_cd(devices: ElementTree.Element, cd: Cd, name: str) -> ElementTree.Element:
    element = _add(devices, "disk", type="file", device="cdrom")
    _add(element, "driver", name="qemu", type="raw")
    _add(element, "source", file=cd.path)
    _add(element, "target", dev=name, bus="sata")
    _add(element, "readonly")
    return element


def _is_open(vnc: Vnc) -> bool:
    """Whether it asks for nothing. Libvirt has passwords and certificates elsewhere."""
    return vnc.password is None and vnc.tls is None


def _add_serial(devices: ElementTree.Element, listener: Listener) -> None:
    """A terminal for 'virsh console', where we would have a socket."""
    serial = _add(devices, "serial", type="pty")
    if listener.log is not None:
        _add(serial, "log", file=listener.log, append="on")
