"""`drivebay vm import`: a VM of a disk image that was made elsewhere."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

from drivebay.cli.output import DONE
from drivebay.cli.progress import Phases
from drivebay.cli.steps import carry_out
from drivebay.cli.vm_create import create, read_wish
from drivebay.cli.vm_words import read_qemu
from drivebay.disks.plan import Plan
from drivebay.disks.starting import connect_or_start
from drivebay.errors import NotFound, UsageError
from drivebay.vm.creation import plan_creation
from drivebay.vm.images.formats import PACKED, check_header, find_format, shown
from drivebay.vm.images.importing import import_file
from drivebay.vm.images.qemu_img import virtual_size
from drivebay.vm.images.store import WHOLE, Image, ImageFacts, Images
from drivebay.vm.qemu import find_qemu
from drivebay.vm.store import Vms

__all__ = ["import_vm"]


def import_vm(found: argparse.Namespace) -> int:
    """Copy a file in as an image of the VM's name, and make the VM of it: both or nothing."""
    path = Path(found.file).absolute()
    called = shown(str(path))
    if not path.is_file():
        raise NotFound(f"there is no file '{called}'")
    if found.image is not None or found.kernel is not None:
        raise UsageError("the system disk is that of the file: leave --image and --kernel out")
    vms, images = Vms(), Images()
    vms.check_free(found.name)
    images.check_free(found.name)
    _rehearse(found, vms, path, called)
    plan = Plan()
    with Phases() as phases:
        plan.add(
            f"copy '{called}' in as image '{found.name}'",
            lambda: import_file(
                images, found.name, path, ImageFacts(called), kind=found.format, report=phases
            ),
        )
        if found.dry_run:
            plan.add(f"make VM '{found.name}' of it", lambda: None)
        if not carry_out(plan, found):
            return DONE
    found.image = found.name
    try:
        return create(found)
    except BaseException:
        if not os.path.lexists(vms.folder / found.name):
            images.delete(found.name, lambda: None)
        raise


def _rehearse(found: argparse.Namespace, vms: Vms, path: Path, called: str) -> None:
    """Refuse at once what could not be made after minutes of copying. Nothing is changed."""
    size = WHOLE
    if not called.endswith(PACKED):
        kind = find_format(path, called, found.format)
        check_header(path, kind, called)
        size = -(-virtual_size(path, kind, called) // WHOLE) * WHOLE
    planned = Image(
        found.name, path, ImageFacts(called), datetime.now(UTC), "", size, size, "", 0, 0
    )
    qemu = find_qemu(found.qemu)
    wish = read_wish(found, found.name, planned)
    with connect_or_start(found.socket) as client:
        plan_creation(vms, wish, qemu, read_qemu(found.qemu), client, found.socket)
