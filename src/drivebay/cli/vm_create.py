"""`drivebay vm create`: from an image, a kernel or nothing to a VM, in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path
from typing import Final

from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import carry_out
from drivebay.cli.vm_vnc import read_vnc
from drivebay.cli.vm_words import (
    read_cloud_init,
    read_disk,
    read_interfaces,
    read_iso,
    read_qemu,
    read_shares,
    said_of_guest,
)
from drivebay.disks.starting import connect_or_start
from drivebay.errors import DrivebayError, HostError, NotFound, UsageError
from drivebay.vm.creation import (
    CPUS,
    MEMORY,
    Creation,
    DiskWish,
    Wish,
    plan_creation,
)
from drivebay.vm.disks import SHARING_WARNING
from drivebay.vm.images.store import Image, Images
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import Boot, CloudInit, NetSpec
from drivebay.vm.store import Vms

__all__ = ["create", "read_wish"]

DEFAULT_IMAGE: Final = "debian"
NO_IMAGE: Final = "none"
_DISK_TO_INSTALL_TO: Final = 20 << 30


def create(found: argparse.Namespace) -> int:
    """Make one VM, and start it if that is wished."""
    vms = Vms()
    _check_text(found)
    qemu = find_qemu(found.qemu)
    image = _image(found)
    name = found.name or _free_name(vms, "vm" if image is None else image.name)
    vms.check_free(name)
    wish = read_wish(found, name, image)
    # An image that somebody deletes meanwhile must not lose its first clone.
    kept = contextlib.nullcontext() if image is None else Images().locked()
    with kept, connect_or_start(found.socket) as client:
        creation = plan_creation(vms, wish, qemu, read_qemu(found.qemu), client, found.socket)
        if not carry_out(creation.plan, found):
            return DONE
    if any(disk.shared for disk in creation.spec.disks):
        print_warning(SHARING_WARNING)
    if found.start or found.wait or found.text:
        from drivebay.cli.vm import start_and_say

        found.name = name
        return start_and_say(found)
    _say(vms, creation, found)
    return DONE


def _check_text(found: argparse.Namespace) -> None:
    """What --text starts is there, and nothing else is to be started."""
    if not found.text:
        return
    iso = read_iso(found.iso)
    if iso is None:
        raise UsageError("--text starts the installer of an ISO", hint="add --iso FILE")
    if found.kernel is not None:
        raise UsageError("--text starts the ISO's kernel, and --kernel another one")
    from drivebay.cli.vm_cd import boot_from, look_for_installer

    boot_from(found)
    look_for_installer(iso)


def _image(found: argparse.Namespace) -> Image | None:
    """The image that was named; Debian's for one who names nothing to start from."""
    if found.image is not None:
        return None if found.image == NO_IMAGE else Images().get(found.image)
    if found.kernel is not None or read_iso(found.iso) is not None:
        return None
    if found.disk and read_disk(found.disk[0]).bdev is not None:
        return None
    images = Images()
    if DEFAULT_IMAGE not in images.names():
        _build_default(images, found)
    return images.get(DEFAULT_IMAGE)


def _build_default(images: Images, found: argparse.Namespace) -> None:
    from drivebay.cli.progress import Phases, print_line
    from drivebay.vm.images.building import build_image

    if found.dry_run:
        raise NotFound(
            f"there is no image '{DEFAULT_IMAGE}' yet, and a dry run builds none",
            hint=f"drivebay image build debian {DEFAULT_IMAGE}",
        )
    print_warning(f"there is no image '{DEFAULT_IMAGE}' yet: building it takes some minutes, once")
    with Phases() as phases:
        build_image(images, "debian", DEFAULT_IMAGE, print_line, phases)


def _free_name(vms: Vms, stem: str) -> str:
    """The image's name, or the first with a number that is free."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", stem)[:32].strip("-") or "vm"
    name, number = stem, 2
    while os.path.lexists(vms.folder / name):
        name, number = f"{stem}-{number}", number + 1
    return name


def read_wish(found: argparse.Namespace, name: str, image: Image | None) -> Wish:
    """What the words ask for. Raises: UsageError, HostError."""
    boot = None
    if found.kernel is not None:
        for path in filter(None, (found.kernel, found.initrd)):
            _check_readable(Path(path))
        initrd = None if found.initrd is None else str(Path(found.initrd).absolute())
        boot = Boot(str(Path(found.kernel).absolute()), initrd, found.append)
    elif found.initrd is not None or found.append:
        raise UsageError("--initrd and --append need a --kernel")
    return Wish(
        name=name,
        memory=MEMORY if found.memory is None else found.memory,
        cpus=CPUS if found.cpus is None else found.cpus,
        image=image,
        overlay=found.overlay,
        disks=_read_disks(found, image),
        nets=read_interfaces(found),
        bus=found.bus,
        firmware=found.firmware,
        iso=read_iso(found.iso),
        boot=boot,
        qemu_args=found.qemu_arg,
        shares=read_shares(found.share or ()),
        vnc=read_vnc(found, None, Vms().others(name)),
        cloud_init=_read_guest(found, name, image),
        user_data=None if found.user_data is None else Path(found.user_data),
    )


def _read_disks(found: argparse.Namespace, image: Image | None) -> list[DiskWish]:
    """Those that were asked for; an installer needs one to install to."""
    if not found.disk and image is None and read_iso(found.iso) is not None:
        return [DiskWish(size=_DISK_TO_INSTALL_TO)]
    return [read_disk(text) for text in found.disk]


def _read_guest(found: argparse.Namespace, name: str, image: Image | None) -> CloudInit | None:
    """What cloud-init is told, where there may be one; an ISO's may be there or not."""
    said = said_of_guest(found) + (["--user-data"] if found.user_data is not None else [])
    from_iso = image is None and read_iso(found.iso) is not None
    lacks = not from_iso if image is None else image.facts.cloud_init is False
    if found.no_cloud_init or lacks:
        if said:
            why = "with --no-cloud-init" if found.no_cloud_init else "without an image that has it"
            raise UsageError(f"{', '.join(said)}: only cloud-init can do that, and {why} it is not "
                             "there")  # fmt: skip
        return None
    if from_iso and not said:
        return None
    return read_cloud_init(found, CloudInit(instance_id="", hostname=name))


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise HostError(f"can't read '{path}'", error.errno or 0, path=str(path)) from error


def _say(vms: Vms, creation: Creation, found: argparse.Namespace) -> None:
    spec = creation.spec
    if found.json:
        from drivebay.cli.vm_show import as_json

        print_json(as_json(vms.load(spec.name)))
        return
    print(f"VM '{spec.name}' is made")
    for net in spec.nets:
        for address in _kept(net):
            print(f"  address   {address} in network '{net.network}'")
    print(f"  start it  drivebay vm start {spec.name} --wait")
    if spec.nets:
        from drivebay.vm.ssh import ssh_command

        try:
            line = " ".join(ssh_command(spec, vms.load(spec.name).keys))
        except DrivebayError:
            return
        print(f"  log in    drivebay vm ssh {spec.name}\n            {line}")


def _kept(net: NetSpec) -> list[str]:
    """What a named network keeps for an interface."""
    if net.network is None:
        return []
    from drivebay.vm.reaching import addresses

    return [each.text for each in addresses(net) if each.source in ("static", "kept")]
