"""`drivebay vm export`: a disk of a VM as a file that other tools read, too."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType

from drivebay.cli.output import DONE, print_json
from drivebay.cli.progress import Phases
from drivebay.cli.steps import carry_out
from drivebay.disks.inventory import read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.disks.starting import connect_or_start
from drivebay.errors import NotFound, UsageError
from drivebay.vm.exporting import Export, export, plan_export
from drivebay.vm.images.formats import FORMATS, format_of_name
from drivebay.vm.spec import DiskSpec
from drivebay.vm.store import Vm, Vms

__all__ = ["export_vm"]


def export_vm(found: argparse.Namespace) -> int:
    """Write one disk of a VM, which may run, to a file."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    vms = Vms()
    vm = vms.load(found.name)
    disk = _disk(vm, found.disk)
    target = Path(found.file).absolute()
    kind = format_of_name(target.name)
    if kind is None or target.suffix.lower() != f".{kind}":
        raise UsageError(
            f"'{target.name}' doesn't say which format it should have",
            hint="end it with one of " + ", ".join(f".{each}" for each in FORMATS),
        )
    served = disk.overlay is None
    with connect_or_start(found.socket) if served else contextlib.nullcontext() as client:
        inventory = None if client is None else read_inventory(client)
        wanted = plan_export(vm, disk, target, kind, inventory)
        plan = Plan([f"It may need {format_size(wanted.needed)} beside the file."])
        with Phases() as phases:
            plan.add(
                f"write disk '{disk.name}' of VM '{vm.name}' to '{target}' as {kind}",
                lambda: export(wanted, vms, client, phases),
            )
            done = carry_out(plan, found)
    if done:
        _say(wanted, found)
    return DONE


def _leave(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does: what was half done is taken away."""
    sys.exit(128 + number)


def _disk(vm: Vm, named: str | None) -> DiskSpec:
    disks = {disk.name: disk for disk in vm.spec.disks}
    if not disks:
        raise UsageError(f"VM '{vm.name}' has no disk")
    if named is None:
        return vm.spec.disks[0]
    if named not in disks:
        raise NotFound(f"VM '{vm.name}' has no disk '{named[:80]}'",
                       hint=f"it has: {', '.join(disks)}")  # fmt: skip
    return disks[named]


def _say(wanted: Export, found: argparse.Namespace) -> None:
    vm, disk = wanted.vm, wanted.disk
    others = [each.name for each in vm.spec.disks if each.name != disk.name]
    if found.json:
        print_json(
            {
                "name": vm.name,
                "disk": disk.name,
                "file": str(wanted.target),
                "format": wanted.kind,
                "consistency": wanted.moment.consistency or None,
                "other_disks": others,
            }
        )
        return
    print(f"disk '{disk.name}' of VM '{vm.name}' is in '{wanted.target}' ({wanted.kind})")
    if wanted.moment.consistency:
        print(f"  its file systems are {wanted.moment.consistency}")
    if others:
        print(f"  not in it: {', '.join(others)} (--disk NAME)")
    if disk != vm.spec.disks[0]:
        return
    words = [f"--memory {vm.spec.memory >> 20}M", f"--cpus {vm.spec.cpus}"]
    words += ["--firmware uefi"] if vm.spec.firmware == "uefi" else []
    words += ["--no-cloud-init"] if vm.spec.cloud_init is None else []
    print(f"  a VM of it: drivebay vm import {wanted.target.name} NEW {' '.join(words)}")
