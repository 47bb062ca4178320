"""QEMU's command line: a machine's parts, spelled as this version of QEMU wants them.

Context: any. Builds lists of words; starts nothing.

Guest memory is always one shared memfd of exactly the machine's size, so that the target
can map it and no size can disagree. Disks are vhost-user-blk with the legacy interface
off: firmware would take that one, and vhost-user targets refuse it. Each disk has a PCIe root
port of its own, since the root bus cannot have anything added or removed while it runs; the
ports come first, in the order of the disks, and so do the guest's names for these.
"""

from __future__ import annotations

from collections.abc import Sequence

from drivebay.errors import UsageError
from drivebay.vm.hardware import (
    Cd,
    Disk,
    Drive,
    Hardware,
    InBridge,
    Listener,
    NamedTap,
    Nic,
    OpenTap,
    OwnNet,
    Share,
    Vnc,
    check_socket_path,
)
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu
from drivebay.vm.vnc import FIRST_PORT

__all__ = ["CD", "CD_MEDIUM", "Properties", "command_line", "disk_parts", "netdev", "spelled"]

Properties = dict[str, "str | int | bool | Properties"]

CD = "cd"  # the drive, and what is in it: never the name of a disk's part
CD_MEDIUM = "cd-medium"

_FIRST_PORT_SLOT = 0x10  # of the root bus; eight ports share a slot
_FIRST_NIC_SLOT = 0x3
_SCREEN_SLOT = 0x18  # behind the last port, as is the next: a guest's other slots stay
_PORTS_MOST = 64
_SHARE_QUEUE = 1024  # the most; QEMU's 128 hold up a guest that reads much at once


def command_line(qemu: Qemu, accelerator: Accelerator, hardware: Hardware) -> list[str]:
    """Return the words that start the machine. Raises: UsageError."""
    line = [str(qemu.path), "-name", spelled({"guest": hardware.name})]
    line += ["-nodefaults", "-no-user-config", "-display", "none"]
    line += ["-sandbox", _sandbox(hardware.nics)]
    line += ["-accel", accelerator.name]
    line += ["-machine", spelled({"type": hardware.machine, "memory-backend": "memory"})]
    line += ["-cpu", "max", "-smp", str(hardware.cpus)]
    if hardware.uuid is not None:
        line += ["-uuid", hardware.uuid]
    line += _memory(hardware)
    for descriptor, number in hardware.files:
        line += ["-add-fd", f"fd={descriptor},set={number}"]
    line += _firmware(hardware)
    line += ["-chardev", _listening("monitor", hardware.monitor)]
    line += ["-mon", "chardev=monitor,mode=control"]
    for name, listener in hardware.serials:
        line += ["-chardev", _listening(name, listener), "-serial", f"chardev:{name}"]
    if hardware.agent is not None:
        line += ["-device", "virtio-serial-pci,id=channels,addr=0x2"]
        line += ["-chardev", _listening("agent", hardware.agent)]
        line += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    line += _buses(hardware)
    for number, disk in enumerate(hardware.disks):
        for option, properties in disk_parts(qemu, disk, f"port{number}"):
            line += [f"-{option}", spelled(properties)]
    first = len(hardware.disks) + hardware.ports
    for number, share in enumerate(hardware.shares):
        line += _share(share, f"port{first + number}")
    line += _cd(hardware.cd)
    for number, nic in enumerate(hardware.nics):
        line += _nic(nic, number)
    line += _screen(hardware.vnc) if hardware.screen else []
    if hardware.start is not None:
        line += ["-kernel", hardware.start.kernel]
        line += ["-initrd", hardware.start.initrd] if hardware.start.initrd else []
        line += ["-append", hardware.start.append] if hardware.start.append else []
    line += ["-no-reboot"] if hardware.ends_at_reboot else []
    line += ["-incoming", "defer"] if hardware.awaits_migration else []
    return line + list(hardware.more)


def spelled(properties: Properties) -> str:
    """Write properties as one word: the first without its name if it is the word's kind.

    A comma separates QEMU's options, and is doubled to mean itself.
    """
    words: list[str] = []
    for key, value in _flat(properties):
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        text = text.replace(",", ",,")
        words.append(text if key in ("driver", "type", "qom-type", "backend") and not words
                     else f"{key}={text}")  # fmt: skip
    return ",".join(words)


def _flat(properties: Properties, prefix: str = "") -> list[tuple[str, str | int | bool]]:
    found: list[tuple[str, str | int | bool]] = []
    for key, value in properties.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


# ---- disks --------------------------------------------------------------------------------------


def disk_parts(qemu: Qemu, disk: Disk | Drive, port: str) -> list[tuple[str, Properties]]:
    """The parts of a disk, as ('chardev' | 'blockdev' | 'device', properties), in order.

    They serve the command line and, for a disk that is added later, the monitor.
    Raises: UsageError; NotFound when this QEMU cannot.
    """
    if isinstance(disk, Disk):
        check_socket_path(disk.socket)
        if disk.bus == "virtio":
            return _vhost_parts(qemu, disk, port)
        qemu.require("vhost-user-block-driver", f"a disk on the bus '{disk.bus}'")
        node: Properties = {
            "driver": "virtio-blk-vhost-user",
            "node-name": f"node-{disk.name}",
            "path": str(disk.socket),
            "cache": {"direct": True},
        }
        return [("blockdev", node), ("device", _device(disk, port))]
    nodes: list[tuple[str, Properties]] = []
    if disk.backing is not None:
        file = _file_node(f"file-{disk.name}-base", disk.backing, True)
        # An image never changes, and the target reads it too: nothing has to be locked.
        nodes.append(("blockdev", file | {"locking": "off"}))
        below = f"file-{disk.name}-base"
        base: Properties = {"driver": "raw", "node-name": f"{disk.name}-base", "file": below,
                            "read-only": True}  # fmt: skip
        nodes.append(("blockdev", base))
    nodes.append(("blockdev", _file_node(f"file-{disk.name}", disk.path, disk.read_only)))
    node = {
        "driver": disk.format,
        "node-name": f"node-{disk.name}",
        "file": f"file-{disk.name}",
        "read-only": disk.read_only,
    }
    if disk.backing is not None:
        node["backing"] = f"{disk.name}-base"
    return [*nodes, ("blockdev", node), ("device", _device(disk, port))]


def _file_node(name: str, path: str, read_only: bool) -> Properties:
    return {
        "driver": "file",
        "node-name": name,
        "filename": path,
        "read-only": read_only,
        "discard": "unmap",
    }


def _vhost_parts(qemu: Qemu, disk: Disk, port: str) -> list[tuple[str, Properties]]:
    reconnect, _, seconds = qemu.option("reconnect").partition("=")
    channel: Properties = {
        "backend": "socket",
        "id": f"vhost-{disk.name}",
        "path": str(disk.socket),
        reconnect: int(seconds),
    }
    device: Properties = {
        "driver": "vhost-user-blk-pci",
        "id": f"disk-{disk.name}",
        "bus": port,
        "chardev": f"vhost-{disk.name}",
        "disable-legacy": "on",
        "num-queues": disk.queues,
    }
    if disk.packed:
        device["packed"] = True
    if disk.boot_order is not None:
        device["bootindex"] = disk.boot_order
    return [("chardev", channel), ("device", device)]


def _device(disk: Disk | Drive, port: str) -> Properties:
    """The emulated device on a block node."""
    device: Properties = {"driver": "", "id": f"disk-{disk.name}", "drive": f"node-{disk.name}"}
    match disk.bus:
        case "virtio":
            device |= {"driver": "virtio-blk-pci", "bus": port, "disable-legacy": "on"}
        case "nvme":
            device |= {"driver": "nvme", "bus": port}
        case "scsi":
            device |= {"driver": "scsi-hd", "bus": "scsi.0"}
        case "sata":
            device |= {"driver": "ide-hd"}
        case _:
            raise UsageError(f"there is no bus '{disk.bus}' for disks")
    device["serial"] = disk.name
    if disk.boot_order is not None:
        device["bootindex"] = disk.boot_order
    return device


def _cd(cd: Cd | None) -> list[str]:
    """On SATA, for which each installer and each firmware has a driver.

    It is the last of the chipset's six ports, so that disks keep their names when it goes.
    """
    if cd is None:
        return []
    device: Properties = {"driver": "ide-cd", "id": CD, "drive": CD_MEDIUM, "bus": "ide.5"}
    if cd.boot_order is not None:
        device["bootindex"] = cd.boot_order
    medium = spelled(_file_node(CD_MEDIUM, cd.path, True))
    return ["-blockdev", medium, "-device", spelled(device)]


def _buses(hardware: Hardware) -> list[str]:
    """Root ports: of the disks, spare ones, of the shares; and the controllers of other buses."""
    line = []
    ports = len(hardware.disks) + hardware.ports + len(hardware.shares)
    if ports > _PORTS_MOST:
        most = _PORTS_MOST - hardware.ports
        raise UsageError(f"a machine has at most {most} disks and shared folders")
    for number in range(ports):
        slot, function = divmod(number, 8)
        port: Properties = {
            "driver": "pcie-root-port",
            "id": f"port{number}",
            "bus": "pcie.0",
            "chassis": number + 1,
            "addr": f"{_FIRST_PORT_SLOT + slot:#x}.{function}",
        }
        if function == 0:
            port["multifunction"] = True
        line += ["-device", spelled(port)]
    if hardware.ports or any(disk.bus == "scsi" for disk in hardware.disks):
        line += ["-device", "virtio-scsi-pci,id=scsi,addr=0x1"]
    return line


# ---- the rest -----------------------------------------------------------------------------------


def _memory(hardware: Hardware) -> list[str]:
    memory = hardware.memory
    size = f"{memory.kib}K" if memory.kib % 1024 else f"{memory.kib // 1024}M"
    backend: Properties = {
        "qom-type": "memory-backend-memfd",
        "id": "memory",
        "size": size,
        "share": True,
    }
    if memory.huge_pages:
        backend |= {"hugetlb": True, "hugetlbsize": "2M"}
    if memory.node is not None:
        backend |= {"host-nodes": memory.node, "policy": "preferred"}
    return ["-m", size, "-object", spelled(backend)]


def _firmware(hardware: Hardware) -> list[str]:
    if hardware.firmware is None:
        return []
    line = []
    for unit, (path, read_only) in enumerate(
        ((hardware.firmware.code, True), (hardware.firmware.variables, False))
    ):
        drive: Properties = {
            "if": "pflash",
            "unit": unit,
            "format": "raw",
            "readonly": read_only,
            "file": path,
        }
        line += ["-drive", spelled(drive)]
    return line


def _screen(vnc: Vnc | None) -> list[str]:
    """What is looked at and pointed at. VNC is served where a client is handed in; QEMU listens
    at no address unless that is wished.
    """
    slot = _SCREEN_SLOT
    return [
        "-device", f"VGA,id=screen,bus=pcie.0,addr={slot:#x}",
        "-device", f"qemu-xhci,id=usb,bus=pcie.0,addr={slot + 1:#x}",
        "-device", "usb-tablet,id=pointer,bus=usb.0",
        *(["-vnc", "none"] if vnc is None else _vnc(vnc)),
    ]  # fmt: skip


def _vnc(vnc: Vnc) -> list[str]:
    """Who has no password shows a certificate, if there are any."""
    line = []
    host = f"[{vnc.address}]" if ":" in vnc.address else vnc.address
    words = f"{host}:{vnc.port - FIRST_PORT}"
    if vnc.password is not None:
        secret: Properties = {"qom-type": "secret", "id": "vnc-password", "file": vnc.password}
        line += ["-object", spelled(secret)]
        words += ",password-secret=vnc-password"
    if vnc.tls is not None:
        tls: Properties = {
            "qom-type": "tls-creds-x509",
            "id": "vnc-tls",
            "dir": vnc.tls,
            "endpoint": "server",
            "verify-peer": vnc.password is None,
        }
        line += ["-object", spelled(tls)]
        words += ",tls-creds=vnc-tls"
    return [*line, "-vnc", words]


def _listening(name: str, listener: Listener) -> str:
    channel: Properties = {"backend": "socket", "id": name}
    if isinstance(listener.place, int):
        channel["fd"] = listener.place
    else:
        check_socket_path(listener.place)
        channel["path"] = str(listener.place)
    channel |= {"server": True, "wait": False}
    if listener.log is not None:
        channel |= {"logfile": listener.log, "logappend": True}
    return spelled(channel)


def _share(share: Share, port: str) -> Sequence[str]:
    channel: Properties = {"backend": "socket", "id": f"share-{share.tag}"}
    if isinstance(share.place, int):
        channel["fd"] = share.place
    else:
        check_socket_path(share.place)
        channel["path"] = str(share.place)
    device: Properties = {
        "driver": "vhost-user-fs-pci",
        "bus": port,
        "chardev": f"share-{share.tag}",
        "tag": share.tag,
        "queue-size": _SHARE_QUEUE,
    }
    return ["-chardev", spelled(channel), "-device", spelled(device)]


# ---- networks -----------------------------------------------------------------------------------


def _sandbox(nics: Sequence[Nic]) -> str:
    """A QEMU of ours starts no program; only one that somebody types may have to."""
    starts = any(
        isinstance(nic.behind, InBridge)
        or (isinstance(nic.behind, NamedTap) and (nic.behind.script or nic.behind.downscript))
        for nic in nics
    )
    return "on,obsolete=deny" + ("" if starts else ",elevateprivileges=deny,spawn=deny")


def _nic(nic: Nic, number: int) -> Sequence[str]:
    device: Properties = {
        "driver": "e1000" if nic.model == "e1000" else "virtio-net-pci",
        "netdev": f"net{number}",
        "mac": nic.mac,
        "romfile": "",  # no start from the network, which would need a file of another package
        "addr": f"{_FIRST_NIC_SLOT + number:#x}",
    }
    if isinstance(nic.behind, OpenTap) and len(nic.behind.descriptors) > 1:
        # An interrupt for each direction of each queue, for changes and for the control queue.
        device |= {"mq": True, "vectors": 2 * len(nic.behind.descriptors) + 2}
    return ["-netdev", netdev(nic, f"net{number}"), "-device", spelled(device)]


def netdev(nic: Nic, name: str) -> str:
    """What is behind an interface, as one word."""
    match nic.behind:
        case OwnNet() as own:
            return _own_net(own, name)
        case OpenTap() as tap:
            return spelled(_open_tap(tap, name))
        case InBridge() as port:
            return spelled({"type": "bridge", "id": name, "br": port.bridge})
        case NamedTap() as tap:
            return spelled(
                {
                    "type": "tap",
                    "id": name,
                    "ifname": tap.ifname,
                    "script": tap.script or "no",
                    "downscript": tap.downscript or "no",
                }
            )


def _own_net(own: OwnNet, name: str) -> str:
    network: Properties = {"type": "user", "id": name}
    if own.addresses is not None:
        network |= {
            "net": str(own.addresses.network),
            "host": str(own.addresses.gateway),
            "dns": str(own.addresses.dns),
            "dhcpstart": str(own.addresses.dhcp_start),
        }
    if own.restrict:
        network |= {"restrict": True, "ipv6": False}  # IPv6 is a way out that has no forwards
    words = [spelled(network)]
    for each in own.forward:
        guest = each.guest_address or own.address
        outside = f"{each.protocol}:{each.host_address}:{each.host_port}"
        words.append(f"hostfwd={outside}-{guest}:{each.guest_port}")
    return ",".join(words)


def _open_tap(tap: OpenTap, name: str) -> Properties:
    several = "s" if len(tap.descriptors) > 1 else ""
    queues = ":".join(map(str, tap.descriptors))
    found: Properties = {"type": "tap", "id": name, f"fd{several}": queues}
    if not tap.vhost:
        return found | {"vhost": False}
    return found | {"vhost": True, f"vhostfd{several}": ":".join(map(str, tap.vhost))}
