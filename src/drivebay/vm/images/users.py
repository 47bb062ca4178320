"""Who stands on an image: clones in the pools of a running target, and VMs by their vm.toml.

Context: a short-lived process. A running target knows best: it also shows clones that were made
by hand, and no longer those that were made independent. Without one, a VM whose vm.toml names
the image and has a disk that we made of it counts; its pool can't be looked into.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from drivebay.disks.inventory import Disk, Inventory
from drivebay.disks.places import data_folder
from drivebay.errors import DrivebayError, InUse
from drivebay.vm.images.store import Image
from drivebay.vm.spec_file import read_spec

__all__ = ["bdev_of", "bdev_parameters", "clones_of", "refuse_used", "users_of"]


def users_of(
    image: Image, inventory: Inventory | None = None, vms: Path | None = None
) -> list[str]:
    """Whoever needs the image, each in words: \"disk 'default/web'\", \"VM 'web'\"."""
    folder = data_folder() / "vms" if vms is None else vms
    users = [] if inventory is None else [f"disk '{disk.reference}'" for disk in
                                          clones_of(image, inventory)]  # fmt: skip
    for path in sorted(folder.glob("*/vm.toml")):
        name = path.parent.name
        try:
            text = path.read_text(errors="replace")
            spec = read_spec(name, text)
        except OSError as error:
            users.append(f"perhaps VM '{name}' (its vm.toml can't be read: {error.strerror})")
            continue
        except DrivebayError:
            if image.name in text:
                users.append(f"perhaps VM '{name}' (its vm.toml can't be understood)")
            continue
        if spec.image != image.name:
            continue
        overlays = any(disk.overlay is not None for disk in spec.disks)
        clones = any(disk.made and disk.bdev is not None for disk in spec.disks)
        if overlays or (clones and inventory is None):
            users.append(f"VM '{name}'")
    return users


def refuse_used(
    image: Image, inventory: Inventory | None, incomplete: Sequence[str], what: str
) -> None:
    """Refuse to change an image on which something stands. Raises: InUse.

    ``incomplete`` are volumes of the target whose external snapshot is not open in it.
    """
    users = users_of(image, inventory)
    if users:
        raise InUse(
            f"image '{image.name}' can't be {what}: {', '.join(users)} "
            f"{'reads' if len(users) == 1 else 'read'} from it",
            hint="delete them first (drivebay vm delete, drivebay disk delete)",
        )
    if inventory is None:
        return
    bdev = bdev_of(image, inventory)
    if bdev is None and incomplete:
        names = ", ".join(f"'{name}'" for name in incomplete)
        raise InUse(
            f"image '{image.name}' can't be {what}: what the disks {names} begin with is not open "
            "in the target, so it may be this image",
            hint="open it to see: drivebay rpc bdev_aio_create "
            + repr(json.dumps(bdev_parameters(image))),
        )
    if bdev is not None and (bdev.claimed or bdev.uses):
        raise InUse(f"image '{image.name}' can't be {what}: a controller or another bdev of the "
                    f"target shows '{bdev.bdev}'")  # fmt: skip


def bdev_parameters(image: Image) -> dict[str, object]:
    """How bdev_aio_create opens an image: by a uuid that stays, since its clones keep that."""
    return {
        "name": image.bdev,
        "filename": str(image.path),
        "block_size": 512,
        "readonly": True,
        "uuid": image.uuid,
    }


def bdev_of(image: Image, inventory: Inventory) -> Disk | None:
    """The target's bdev on image.raw."""
    return next(
        (disk for disk in inventory.volumes if disk.place == str(image.path.absolute())), None
    )


def clones_of(image: Image, inventory: Inventory) -> list[Disk]:
    """Volumes that begin with the image, and those that begin with them; no snapshots."""
    names = {image.uuid, image.bdev}
    bdev = bdev_of(image, inventory)
    if bdev is not None:
        names.update((bdev.bdev, *bdev.aliases))
    waiting = [volume for volume in inventory.volumes if volume.external in names]
    found: list[Disk] = []
    while waiting:
        volume = waiting.pop(0)
        children = inventory.children(volume)
        if not (volume.snapshot and children):
            found.append(volume)
        waiting += children
    return found
