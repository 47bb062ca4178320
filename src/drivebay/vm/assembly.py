"""From vm.toml to a machine: which hardware a VM's QEMU gets.

Context: a short-lived process. Everything that QEMU opens goes through a Places: for a start
those are descriptors (`run.Descriptors`), for a command line to look at, paths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from drivebay.vm.firmware import find_uefi
from drivebay.vm.hardware import (
    SPARE_PORTS,
    Cd,
    Disk,
    Drive,
    Firmware,
    Hardware,
    InBridge,
    Listener,
    Memory,
    NamedTap,
    Nic,
    OpenTap,
    OwnNet,
    Share,
    Start,
    Vnc,
)
from drivebay.vm.images.store import Images
from drivebay.vm.joining import bridge_of
from drivebay.vm.placement import Placement
from drivebay.vm.spec import DHCP, Boot, DiskSpec, NetSpec, ShareSpec, VncSpec
from drivebay.vm.store import Vm
from drivebay.vm.user_net import user_net

__all__ = ["Once", "Paths", "Places", "assemble", "share_socket", "vhost_disk"]

_QUEUES_MOST: Final = 16
_HUGE_KIB: Final = 2048
_FREE_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_RESERVED_HUGE_PAGES: Final = _FREE_HUGE_PAGES.with_name("resv_hugepages")


class Places(Protocol):
    """How QEMU reaches files and sockets."""

    @property
    def files(self) -> Sequence[tuple[int, int]]: ...
    def file(self, path: Path, flags: int = os.O_RDONLY) -> str: ...
    def readable(self, path: Path) -> str: ...
    def secret(self, path: Path) -> str: ...
    def certificates(self, folder: Path) -> str: ...
    def listener(self, path: Path, log: Path | None = None) -> Listener: ...


class Paths:
    """By their paths, as for a QEMU of the same user."""

    files: Sequence[tuple[int, int]] = ()

    def file(self, path: Path, flags: int = os.O_RDONLY) -> str:
        return str(path)

    def readable(self, path: Path) -> str:
        return str(path)

    def secret(self, path: Path) -> str:
        return str(path)

    def certificates(self, folder: Path) -> str:
        return str(folder)

    def listener(self, path: Path, log: Path | None = None) -> Listener:
        return Listener(path, None if log is None else str(log))


@dataclass(frozen=True)
class Once:
    """How a machine starts this time only: vm.toml does not know of it."""

    iso_first: bool = False
    boot: Boot | None = None  # an installer's kernel, which a reboot must not start again


def assemble(
    vm: Vm,
    places: Places,
    sockets: Mapping[str, Path],
    placement: Placement,
    shares: Mapping[str, Path | int] | None = None,
    once: Once = Once(),
    taps: Mapping[str, OpenTap] | None = None,
) -> Hardware:
    """Return the machine of a VM.

    ``sockets`` are the controllers' by the disk's name, ``shares`` the virtiofsds' by tag; one
    that is not named is expected in the VM's folder. ``taps`` are those that were opened, by the
    interface's MAC address; the others are told to QEMU by name.

    The firmware starts the first disk, and when there is nothing on it, the ISO.

    Raises: NotFound for a firmware or an image that is gone, HostError.
    """
    spec = vm.spec
    boot = once.boot or (None if once.iso_first else spec.boot)
    first_disk, iso = (1, 0) if once.iso_first else (0, 1)
    disks = _disks(vm, places, sockets, first_disk if boot is None else None)
    firmware = None
    if spec.firmware == "uefi":
        code, _ = find_uefi()
        variables = places.file(vm.firmware_variables, os.O_RDWR)
        firmware = Firmware(places.file(code), variables)
    cd = None
    if spec.iso is not None:
        cd = Cd(places.file(Path(spec.iso)), iso if boot is None else None)
    start = None
    if boot is not None:
        start = Start(
            places.readable(Path(boot.kernel)),
            None if boot.initrd is None else places.readable(Path(boot.initrd)),
            boot.append,
        )
    memory_kib = spec.memory // 1024
    monitor = places.listener(vm.monitor_socket)
    console = places.listener(vm.console_socket, vm.console_log)
    agent = places.listener(vm.agent_socket)
    return Hardware(
        name=spec.name,
        uuid=spec.uuid,
        machine=spec.machine,
        cpus=spec.cpus,
        memory=Memory(memory_kib, placement.node, _huge_pages_suffice(memory_kib)),
        monitor=monitor,
        serials=[("console", console)],
        agent=agent,
        screen=True,
        vnc=None if spec.vnc is None else _vnc(spec.vnc, places),
        disks=disks,
        shares=[_share(vm, share, shares or {}) for share in spec.shares],
        cd=cd,
        nics=[Nic(net.mac, _behind(net, taps or {}), net.model) for net in spec.nets],
        start=start,
        firmware=firmware,
        ends_at_reboot=once.boot is not None,
        ports=SPARE_PORTS,
        more=spec.qemu_args,
        files=places.files,
    )


def _share(vm: Vm, share: ShareSpec, served: Mapping[str, Path | int]) -> Share:
    place = served.get(share.tag, share_socket(vm, share))
    return Share(share.tag, place, share.directory, share.read_only)


def share_socket(vm: Vm, share: ShareSpec) -> Path:
    """Where a virtiofsd that somebody starts by hand should listen."""
    return vm.folder / f"share-{share.tag}.sock"


def _vnc(vnc: VncSpec, places: Places) -> Vnc:
    password = None if vnc.password_file is None else places.secret(Path(vnc.password_file))
    tls = None if vnc.tls is None else places.certificates(Path(vnc.tls))
    return Vnc(vnc.address, vnc.port, password, tls)


def _disks(
    vm: Vm, places: Places, sockets: Mapping[str, Path], boot_order: int | None
) -> list[Disk | Drive]:
    """All disks; ``boot_order`` is the first one's."""
    disks: list[Disk | Drive] = []
    for disk in vm.spec.disks:
        order = boot_order if not disks else None
        if disk.bdev is not None:
            disks.append(vhost_disk(vm, disk, sockets[disk.name], order))
        else:
            disks.append(_overlay(vm, disk, places, order))
    if vm.spec.cloud_init is not None:
        disks.append(Drive("seed", places.file(vm.seed), read_only=True))
    return disks


def vhost_disk(vm: Vm, disk: DiskSpec, socket: Path, boot_order: int | None = None) -> Disk:
    """A disk of the target, as the machine sees it."""
    return Disk(
        socket,
        queues=min(vm.spec.cpus, _QUEUES_MOST),
        name=disk.name,
        bus=vm.spec.bus_of(disk),
        boot_order=boot_order,
    )


def _overlay(vm: Vm, disk: DiskSpec, places: Places, boot_order: int | None) -> Drive:
    assert disk.overlay is not None
    backing = None
    if vm.spec.image is not None:
        backing = places.file(Images().get(vm.spec.image).path)
    return Drive(
        disk.name,
        places.file(vm.folder / disk.overlay, os.O_RDWR),
        "qcow2",
        backing,
        bus=vm.spec.bus_of(disk),
        boot_order=boot_order,
    )


def _behind(net: NetSpec, taps: Mapping[str, OpenTap]) -> OwnNet | OpenTap | InBridge | NamedTap:
    if net.kind == "user":
        address = "" if net.address == DHCP else net.address.partition("/")[0]
        chosen = net.subnet is not None or net.dhcp_start is not None
        return OwnNet(net.forward, address, net.restrict, user_net(net) if chosen else None)
    if net.mac in taps:
        return taps[net.mac]
    if net.kind == "tap":
        assert net.ifname is not None
        return NamedTap(net.ifname, net.script, net.downscript)
    return InBridge(bridge_of(net))


def _huge_pages_suffice(kib: int) -> bool:
    """Whether the host has so many huge pages that nobody has asked for."""
    try:
        free = int(_FREE_HUGE_PAGES.read_text()) - int(_RESERVED_HUGE_PAGES.read_text())
    except (OSError, ValueError):
        return False
    return kib % _HUGE_KIB == 0 and free * _HUGE_KIB >= kib
