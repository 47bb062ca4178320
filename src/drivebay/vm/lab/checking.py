"""What a lab's tables say of each other: names, sizes, who has which disk and port.

Context: any; pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from drivebay.disks.inventory import check_name
from drivebay.disks.sizes import format_size
from drivebay.vm.lab.lines import Place
from drivebay.vm.lab.model import Lab, LabDisk, LabVm, VmDisk
from drivebay.vm.lab.words import located, nearest
from drivebay.vm.spec import DHCP

__all__ = ["check_lab"]


def check_lab(lab: Lab) -> None:
    """Raises: LabMistake for the first thing that cannot be."""
    _check_names(lab)
    _check_places(lab)
    _check_sizes(lab)
    _check_parts(lab)
    _check_holders(lab)
    _check_ports(lab)
    _check_networks(lab)


def _check_names(lab: Lab) -> None:
    """By counting up, two tables may come to the same name; and a VM's own disk is a disk, too."""
    for kind, things in (("disk", lab.disks), ("VM", lab.vms)):
        seen: dict[str, Place] = {}
        for thing in things:
            if thing.name in seen:
                raise lab.source.mistake(
                    max(thing.place, seen[thing.name], key=lab.source.line),
                    f"the {kind} '{thing.name}' is there twice: [{'.'.join(map(str, thing.place))}]"
                    f" (line {lab.source.line(thing.place)}) and "
                    f"[{'.'.join(map(str, seen[thing.name]))}] "
                    f"(line {lab.source.line(seen[thing.name])})",
                )
            seen[thing.name] = thing.place
    systems = {f"{vm.name}-system": vm for vm in lab.vms if vm.has_system_disk}
    for disk in lab.disks:
        with located(lab.source, disk.place):
            check_name(lab.full(disk.name), "disk")
        if disk.name in systems:
            raise lab.source.mistake(
                disk.place,
                f"the disk '{disk.name}' is called as the system disk of the VM "
                f"'{systems[disk.name].name}'",
            )


def _check_places(lab: Lab) -> None:
    """Two things on one file would destroy each other."""
    seen: dict[Path, Place] = {}
    for place, path in _places(lab):
        real = path.resolve()
        if real in seen:
            raise lab.source.mistake(
                place,
                f"'{path}' is used twice: line {lab.source.line(seen[real])} has it already",
            )
        seen[real] = place


def _places(lab: Lab) -> Iterator[tuple[Place, Path]]:
    for pool in lab.pools:
        if pool.file is not None:
            yield (*pool.place, "file"), pool.file
        elif pool.device is not None:
            yield (*pool.place, "device"), Path(pool.device)
    for disk in lab.disks:
        if disk.file is not None:
            yield (*disk.place, "file"), disk.file


def _check_sizes(lab: Lab) -> None:
    """A disk takes up what is written to it, so that all may promise more than there is; one that
    alone is larger than its pool could never be filled.
    """
    sizes = {pool.name: pool.size for pool in lab.pools}
    things: list[LabDisk | LabVm] = [disk for disk in lab.disks if disk.in_pool]
    for thing in [*things, *lab.vms]:
        pool = sizes.get(thing.pool) if thing.pool is not None else None
        if pool is not None and thing.size is not None and thing.size > pool:
            raise lab.source.mistake(
                (*thing.place, "size"),
                f"'{thing.name}' is {format_size(thing.size)} large, and its pool "
                f"'{thing.pool}' {format_size(pool)}",
                hint="a larger pool, or a smaller disk",
            )


# ---- parts --------------------------------------------------------------------------------------


def _check_parts(lab: Lab) -> None:
    disks = {disk.name: disk for disk in lab.disks}
    splitters: dict[str, Place] = {}
    for disk in lab.disks:
        if disk.base is None or disk.part > 0:
            continue
        at = (*disk.place, "split")
        if disk.base not in disks:
            raise lab.source.mistake(
                at, f"there is no disk '{disk.base[:80]}' in this file",
                hint=nearest(disk.base, disks),
            )  # fmt: skip
        if disk.base in splitters:
            raise lab.source.mistake(
                at, f"the disk '{disk.base}' is split twice: line "
                f"{lab.source.line(splitters[disk.base])} does so already",
            )  # fmt: skip
        splitters[disk.base] = at
        _check_cycle(lab, disks, disk)
        base = disks[disk.base]
        if disk.size is not None and base.size is not None and disk.size * disk.parts > base.size:
            raise lab.source.mistake(
                (*disk.place, "size"),
                f"{disk.parts} parts of {format_size(disk.size)} are more than the disk "
                f"'{disk.base}' has: {format_size(base.size)}",
            )


def _check_cycle(lab: Lab, disks: dict[str, LabDisk], disk: LabDisk) -> None:
    way = [disk.name]
    groups = {disk.group}
    base = disk.base
    while base is not None and base in disks:
        way.append(base)
        if disks[base].group in groups:
            raise lab.source.mistake(
                (*disk.place, "split"),
                f"a disk can't be a part of itself: {' of '.join(way)}",
            )
        groups.add(disks[base].group)
        base = disks[base].base


# ---- who has what -------------------------------------------------------------------------------


def _check_holders(lab: Lab) -> None:
    split = {disk.base for disk in lab.disks}
    holders: dict[str, list[tuple[LabVm, VmDisk]]] = {}
    for vm in lab.vms:
        for disk in vm.disks:
            holders.setdefault(disk.disk, []).append((vm, disk))
    for name, having in holders.items():
        vm = having[0][0]
        at = (*vm.place, "disks")
        if name in split:
            raise lab.source.mistake(
                at, f"the disk '{name}' is split, so that only its parts can be given to VMs"
            )
        names = [each.name for each, _ in having]
        if len(set(names)) < len(names):
            raise lab.source.mistake(at, f"the VM '{vm.name}' has the disk '{name}' twice")
        alone = [each for each, disk in having if not disk.shared]
        if len(having) > 1 and alone:
            raise lab.source.mistake(
                (*alone[0].place, "disks"),
                f"the disk '{name}' is given to several VMs: {', '.join(names)}; two writers "
                "destroy a file system",
                hint="a disk for each VM ('count' at the disk, its name without a number here); or "
                f'{{ disk = "{name}", shared = true }} at all of them',
            )


def _check_ports(lab: Lab) -> None:
    seen: dict[tuple[str, int], LabVm] = {}
    for vm in lab.vms:
        for forward in (each for net in vm.nets or () for each in net.forward):
            other = seen.get(forward.outside)
            if other is not None:
                raise lab.source.mistake(
                    (*vm.place, "nets"),
                    f"port {forward.host_port} leads to the VM '{other.name}' (line "
                    f"{lab.source.line((*other.place, 'nets'))}), and can't lead to "
                    f"'{vm.name}', too",
                    hint="the port of the host counts up by one with each VM of a table",
                )
            seen[forward.outside] = vm


def _check_networks(lab: Lab) -> None:
    """Networks need names and addresses of their own, and VMs in one an address each."""
    made = [net for net in lab.nets if net.is_made]
    for number, net in enumerate(made):
        for other in made[:number]:
            if lab.network_name(net.name) == lab.network_name(other.name):
                what = f"would be called '{lab.network_name(net.name)}' both"
            elif net.subnet and other.subnet and net.subnet.overlaps(other.subnet):
                what = f"have addresses in common: {net.subnet} and {other.subnet}"
            else:
                continue
            raise lab.source.mistake(net.place, f"[net.{other.name}] and [net.{net.name}] {what}")
    seen: dict[tuple[str, str], LabVm] = {}
    for vm in lab.vms:
        for net_spec in vm.nets or ():
            joined = net_spec.network or net_spec.bridge
            if joined is None or net_spec.address == DHCP:
                continue
            key = (joined, net_spec.address)
            if key in seen:
                raise lab.source.mistake(
                    (*vm.place, "nets"),
                    f"the VMs '{seen[key].name}' and '{vm.name}' have one address in one network: "
                    f"{net_spec.address}",
                    hint="leave it out: each VM of a named network keeps the address that it gets",
                )
            seen[key] = vm
