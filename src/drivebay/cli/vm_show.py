"""`drivebay vm list|info|qemu-command|libvirt-xml`: what VMs are, and what runs."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from drivebay.cli.output import DONE, print_json, print_table, print_warning
from drivebay.cli.vm_vnc import vnc_words
from drivebay.disks.sizes import format_size
from drivebay.errors import DrivebayError, StateError
from drivebay.vm import run
from drivebay.vm.disks import controller_name
from drivebay.vm.snapshots import all_of
from drivebay.vm.spec import DHCP, DiskSpec, VmSpec
from drivebay.vm.spec_file import read_spec
from drivebay.vm.store import Vm, Vms

__all__ = ["as_json", "info", "libvirt_xml", "pending", "qemu_command", "show_all"]


_NO_RESTART = ("autostart", "lab")  # nothing that a machine sees
_SOURCES = {  # how an address is known (vm.reaching)
    "static": "static",
    "kept": "kept for it",
    "seen": "seen",
    "agent": "as its guest agent says",
}


def show_all(found: argparse.Namespace) -> int:
    """List all VMs; one whose vm.toml is wrong is listed with what is wrong."""
    vms = Vms()
    names = vms.names()
    if found.quiet:
        print("".join(f"{name}\n" for name in names), end="")
        return DONE
    shown = []
    for name in names:
        try:
            shown.append(_known(vms.load(name)))
        except DrivebayError as error:
            shown.append({"name": name, "state": "broken", "error": str(error)})
            if not found.json:
                print_warning(str(error))
    if found.json:
        print_json(shown)
    elif not shown:
        print("there is no VM yet: drivebay vm create")
    else:
        rows = [
            (
                entry["name"],
                entry["state"],
                entry.get("cpus", "-"),
                format_size(entry["memory"]) if "memory" in entry else "-",
                entry.get("image") or "-",
                ", ".join(disk["name"] for disk in entry.get("disks", ())),
                ", ".join(forward for net in entry.get("nets", ()) for forward in net["forward"]),
                entry.get("lab") or "-",
                "yes" if entry.get("autostart") else "-",
            )
            for entry in shown
        ]
        header = ("name", "state", "cpus", "memory", "image", "disks", "ports", "lab", "autostart")
        print_table(header, rows)
    return DONE


def info(found: argparse.Namespace) -> int:
    """Show one VM."""
    vm = Vms().load(found.name)
    shown = as_json(vm)
    if found.json:
        print_json(shown)
        return DONE
    print(f"name       {vm.name}")
    state = shown["state"]
    if shown["pid"] is not None:
        state += f", process {shown['pid']}, {shown['accelerator']}"
    print(f"state      {state}")
    spec = vm.spec
    print(f"machine    {spec.cpus} CPUs, {format_size(spec.memory)}, {spec.machine}, "
          f"{spec.firmware}")  # fmt: skip
    if spec.image is not None:
        print(f"image      {spec.image}")
    if spec.lab is not None:
        print(f"lab        {spec.lab}")
    if spec.iso is not None:
        print(f"iso        {spec.iso}")
    for disk in spec.disks:
        print(f"disk       {_disk_words(vm, disk)}")
    for net in shown["nets"]:
        print(f"network    {', '.join(_net_words(net))}")
    for share in spec.shares:
        only = ", read-only" if share.read_only else ""
        print(f"share      {share.tag}: {share.directory}{only}")
    print(f"autostart  {'with the host' if spec.autostart else 'no'}")
    if shown["snapshots"]:
        print(f"snapshots  {', '.join(shown['snapshots'])}")
    if spec.vnc is not None:
        print(f"vnc        {vnc_words(spec.vnc)}")
    print(f"folder     {vm.folder}")
    for line in shown["pending"]:
        print(f"waits for a restart: {line}")
    return DONE


def as_json(vm: Vm) -> dict[str, Any]:
    """Everything that is known of a VM, also by its guest, which may take a second to ask."""
    from drivebay.vm import reaching

    known = _known(vm)
    found = run.running(vm)
    said = [] if found is None else reaching.said_by_agent(vm.agent_socket)
    taps = {} if found is None else reaching.host_interfaces(found.pid)
    started = [] if found is None else [net.mac for net in _as_started(vm, found).nets]
    for shown, net in zip(known["nets"], vm.spec.nets, strict=True):
        shown["interface"] = taps.get(started.index(net.mac)) if net.mac in started else None
        shown["addresses"] = [dict(vars(each)) for each in reaching.addresses(net, said)]
    texts = [each["text"] for net in known["nets"] for each in net["addresses"]]
    return {**known, "addresses": list(dict.fromkeys(texts))}


def _known(vm: Vm) -> dict[str, Any]:
    """What its folder and its process say."""
    spec = vm.spec
    found = run.running(vm)
    return {
        "name": vm.name,
        "state": "off" if found is None else "running",
        "pid": None if found is None else found.pid,
        "accelerator": None if found is None else found.accelerator,
        "uuid": spec.uuid,
        "machine": spec.machine,
        "firmware": spec.firmware,
        "cpus": spec.cpus,
        "memory": spec.memory,
        "image": spec.image,
        "iso": spec.iso,
        "lab": spec.lab,
        "autostart": spec.autostart,
        "disks": [
            {
                "name": disk.name,
                "bdev": disk.bdev,
                "overlay": disk.overlay,
                "bus": spec.bus_of(disk),
                "made": disk.made,
                "shared": disk.shared,
            }
            for disk in spec.disks
        ],
        "nets": [
            {
                "kind": net.kind,
                "joins": net.network or net.bridge or net.ifname or net.subnet,
                "mac": net.mac,
                "model": net.model,
                "address": net.address,
                "restrict": net.restrict,
                "forward": [str(forward) for forward in net.forward],
            }
            for net in spec.nets
        ],
        "shares": [dict(vars(share)) for share in spec.shares],
        "snapshots": all_of(vm),
        "vnc": None if spec.vnc is None else dict(vars(spec.vnc)),
        "pending": [] if found is None else pending(vm, found),
        "folder": str(vm.folder),
    }


def _addresses(vm: Vm) -> list[str]:
    """What the guest's agent says; nothing without one."""
    from drivebay.vm.agent import Agent

    try:
        with Agent(vm.agent_socket, timeout_s=1.0) as agent:
            found = agent.network_addresses()
    except (DrivebayError, OSError):
        return []
    return [
        address
        for interface in found
        if interface.name != "lo"
        for address in interface.addresses
        if not address.startswith("fe80:")
    ]


def pending(vm: Vm, found: run.Running) -> list[str]:
    """What vm.toml says otherwise than the running machine was started with."""
    before = _as_started(vm, found)
    return [
        _change(field.name, before, vm.spec)
        for field in fields(VmSpec)
        if field.name not in _NO_RESTART
        and getattr(before, field.name) != getattr(vm.spec, field.name)
    ]


def _as_started(vm: Vm, found: run.Running) -> VmSpec:
    """What the machine was started with; what vm.toml says when that can't be read any more."""
    try:
        return read_spec(vm.name, found.text)
    except DrivebayError:
        return vm.spec


def _change(name: str, before: VmSpec, after: VmSpec) -> str:
    old, new = getattr(before, name), getattr(after, name)
    if name == "memory":
        return f"memory: {format_size(old)} now, {format_size(new)} then"
    if isinstance(old, str | int) and isinstance(new, str | int):
        return f"{name}: {old} now, {new} then"
    return f"{name}: changed"


def _disk_words(vm: Vm, disk: DiskSpec) -> str:
    where = disk.bdev or f"{disk.overlay}, an overlay"
    marks = [vm.spec.bus_of(disk)]
    marks += ["shared"] if disk.shared else []
    marks += [] if disk.made else ["not made for it"]
    if disk.bdev is not None:
        marks.append(f"controller {controller_name(vm.name, disk.name)}")
    return f"{disk.name}: {where} ({', '.join(marks)})"


def _net_words(shown: dict[str, Any]) -> list[str]:
    """One interface: what it joins, its MAC, the host's end, its addresses and ports."""
    joins = [] if shown["joins"] is None else [shown["joins"]]
    kind = [] if shown["kind"] == "network" else [shown["kind"]]
    words = [" ".join([*kind, *joins]), shown["mac"]]
    words += [] if shown["model"] == "virtio" else [shown["model"]]
    words += [] if shown["interface"] is None else [shown["interface"]]
    found = [f"{each['text']} ({_SOURCES[each['source']]})" for each in shown["addresses"]]
    if shown["address"] == DHCP and not found:
        found = ["its address by DHCP"]
    words += found
    words += ["reaches nothing outside"] if shown["restrict"] else []
    return words + [f"port {forward}" for forward in shown["forward"]]


# ---- other words for the same machine -----------------------------------------------------------


def qemu_command(found: argparse.Namespace) -> int:
    """Print QEMU's command line, as somebody would type it."""
    from drivebay.vm.assembly import Paths, assemble, share_socket
    from drivebay.vm.command import command_line
    from drivebay.vm.kvm import choose_accelerator
    from drivebay.vm.placement import Placement
    from drivebay.vm.qemu import find_qemu

    vm = Vms().load(found.name)
    qemu = find_qemu(vm.spec.qemu)
    hardware = assemble(vm, Paths(), _sockets(vm, found.socket), Placement())
    for share in vm.spec.shares:
        print_warning(f"it needs a virtiofsd that serves '{share.directory}' at "
                      f"'{share_socket(vm, share)}'")  # fmt: skip
    line = command_line(qemu, choose_accelerator(), hardware)
    if found.json:
        print_json(line)
    else:
        print(" \\\n  ".join(shlex.join(words) for words in _by_option(line)))
    return DONE


def _by_option(line: list[str]) -> list[list[str]]:
    """An option and its value on one line."""
    grouped: list[list[str]] = [[]]
    for word in line:
        if word.startswith("-") and grouped[-1]:
            grouped.append([])
        grouped[-1].append(word)
    return grouped


def libvirt_xml(found: argparse.Namespace) -> int:
    """Print the VM as a libvirt domain; what libvirt has no words for goes to standard error."""
    from drivebay.system.processes import unprivileged
    from drivebay.vm.assembly import Paths, assemble
    from drivebay.vm.kvm import choose_accelerator
    from drivebay.vm.libvirt import domain_xml
    from drivebay.vm.placement import Placement
    from drivebay.vm.qemu import find_qemu

    vm = Vms().load(found.name)
    hardware = assemble(vm, Paths(), _sockets(vm, found.socket), Placement())
    identity = unprivileged()
    user = None if identity is None else (identity.uid, identity.gid)
    domain = domain_xml(find_qemu(vm.spec.qemu), choose_accelerator(), hardware, user)
    for note in domain.notes:
        print_warning(note)
    print(domain.xml)
    return DONE


def _sockets(vm: Vm, socket: str | None) -> dict[str, Path]:
    """Where the controllers of a VM's disks listen, or will once it is started."""
    from drivebay.disks.connection import call, connect

    served = [disk.name for disk in vm.spec.disks if disk.bdev is not None]
    if not served:
        return {}
    with connect(socket) as client:
        shown = {entry["ctrlr"]: entry["socket"] for entry in call(client, "vhost_get_controllers")}
    found = {}
    for name in served:
        controller = controller_name(vm.name, name)
        if controller not in shown:
            raise StateError(
                f"the target does not offer disk '{name}' of VM '{vm.name}' yet",
                hint=f"a start makes its socket: drivebay vm start {vm.name}",
            )
        found[name] = Path(shown[controller])
    return found
