"""A VM's disks in the running target: made, offered on sockets, and who else writes to them.

Context: a short-lived process that reaches the target through rpc.client. Each disk of a VM
has a controller of its own, vm.NAME.DISK, which stays while the VM has the disk: the target's
kept configuration brings it back after a restart, and QEMU reconnects.

A disk has one writer, or several that all know of it (``shared``): ext4, XFS and NTFS are
destroyed by two. So before a VM gets a disk, both the other VMs' vm.toml and the sessions of
the target's controllers are looked at.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.disks.connection import call
from drivebay.disks.inventory import Disk, Inventory, check_name, read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import AlreadyExists, InUse, NotFound, StateError, UsageError
from drivebay.system.processes import unprivileged
from drivebay.vm.images.users import bdev_of, bdev_parameters, clones_of

if TYPE_CHECKING:
    from drivebay.rpc.client import Client
    from drivebay.vm.images.store import Image
    from drivebay.vm.spec import DiskSpec, VmSpec
    from drivebay.vm.store import Vm

__all__ = [
    "CLONE_SNAPSHOT",
    "EXPORT_SNAPSHOT",
    "SHARING_WARNING",
    "SNAPSHOTS_OF_OURS",
    "check_volume_free",
    "check_way",
    "check_writers",
    "controller_name",
    "ensure_controller",
    "inventory_when_let_go",
    "offer",
    "plan_clone_of_image",
    "plan_closing_of_image",
    "plan_deletion",
    "plan_empty_disk",
    "plan_offer",
    "remove_controller",
]

# A snapshot that `vm clone` took is called DISK@clone-XXXXXXXX; it goes when nobody needs it.
CLONE_SNAPSHOT: Final = "clone-"
# `vm export` took this one, for as long as its process PID lives.
EXPORT_SNAPSHOT: Final = "export-"
SNAPSHOTS_OF_OURS: Final = re.compile(
    rf"{CLONE_SNAPSHOT}[0-9a-f]{{8}}|{EXPORT_SNAPSHOT}[0-9]+", re.ASCII
)
SHARING_WARNING: Final = (
    "ext4, XFS and NTFS are destroyed when two machines write to one disk: share it only with a "
    "cluster file system (OCFS2, GFS2), or read-only"
)

LETTING_GO_SECONDS: Final = 5.0
_LOOK_EVERY_S: Final = 0.02
_MIB: Final = 1 << 20


def controller_name(vm: str, disk: str) -> str:
    """The name of a disk's controller, and of its socket."""
    return f"vm.{vm}.{disk}"


# ---- making disks -------------------------------------------------------------------------------


def plan_clone_of_image(
    plan: Plan,
    client: Client,
    inventory: Inventory,
    image: Image,
    pool: str,
    name: str,
    size: int | None,
) -> None:
    """A volume that begins as an image, which it reads what it has not written itself from.

    Raises: UsageError when ``size`` is smaller than the image; AlreadyExists.
    """
    if size is not None and size < image.size:
        raise UsageError(
            f"the image '{image.name}' needs {format_size(image.size)}, and a disk of "
            f"{format_size(size)} is smaller",
            hint=f"--disk {-(-image.size // _MIB)}M, or more",
        )
    check_volume_free(inventory, pool, name)
    if bdev_of(image, inventory) is None:
        plan.add(
            f"open the image '{image.name}', read-only",
            lambda: call(client, "bdev_aio_create", bdev_parameters(image)),
            lambda: call(client, "bdev_aio_delete", {"name": image.bdev}),
        )
    plan.add(
        f"make the disk '{name}' in pool '{pool}', a clone of the image '{image.name}'",
        lambda: call(
            client,
            "bdev_lvol_clone_bdev",
            {"bdev": image.uuid, "lvs_name": pool, "clone_name": name},
        ),
        lambda: call(client, "bdev_lvol_delete", {"name": f"{pool}/{name}"}),
    )
    if size is not None and size > image.size:
        plan.add(
            f"make it {format_size(size)} long",
            lambda: call(
                client,
                "bdev_lvol_resize",
                {"name": f"{pool}/{name}", "size_in_mib": -(-size // _MIB)},
            ),
        )


def plan_empty_disk(
    plan: Plan, client: Client, inventory: Inventory, pool: str, name: str, size: int
) -> None:
    """A thin volume. Raises: AlreadyExists, UsageError."""
    check_volume_free(inventory, pool, name)
    if size < _MIB:
        raise UsageError(f"a disk of {size} bytes is too small: at least 1 MiB")
    plan.add(
        f"make the disk '{name}' of {format_size(size)} in pool '{pool}'",
        lambda: call(
            client,
            "bdev_lvol_create",
            {
                "lvol_name": name,
                "size_in_mib": -(-size // _MIB),
                "thin_provision": True,
                "lvs_name": pool,
            },
        ),
        lambda: call(client, "bdev_lvol_delete", {"name": f"{pool}/{name}"}),
    )


def check_volume_free(inventory: Inventory, pool: str, name: str) -> None:
    """Raises: AlreadyExists; UsageError for a name that no disk can have."""
    check_name(name, "disk")
    if any(disk.pool == pool and disk.name == name for disk in inventory.volumes):
        raise AlreadyExists(
            f"there is a disk '{name}' in pool '{pool}' already",
            hint=f"drivebay disk info {pool}/{name}",
        )


def plan_deletion(
    plan: Plan, client: Client, inventory: Inventory, vm: str, disk: DiskSpec
) -> None:
    """Delete a disk that was made for a VM, and the snapshots that nothing else needs then.

    A snapshot from which several read stays, and goes with the last but one of them.
    Raises: InUse.
    """
    assert disk.bdev is not None
    try:
        volume = inventory.disk(disk.bdev)
    except NotFound:
        return  # somebody was quicker, which is what is wished
    for use in volume.uses:
        if use.controller != controller_name(vm, disk.name):
            raise InUse(
                f"controller '{use.controller}' shows the disk '{disk.bdev}', too",
                hint=f'drivebay rpc vhost_delete_controller \'{{"ctrlr": "{use.controller}"}}\'; '
                "or --keep-disks",
            )
    if volume.claimed:
        raise InUse(
            f"another bdev stands on the disk '{disk.bdev}'",
            hint="drivebay rpc bdev_get_bdevs tells which; delete that first, or --keep-disks",
        )
    doomed = [volume]
    below = sorted(
        {*inventory.snapshots_of(volume), *inventory.chain(volume)},
        key=lambda one: len(list(inventory.chain(one))),
        reverse=True,
    )
    for snapshot in below:
        owner, _, mark = snapshot.name.partition("@")
        readers = len(_readers(inventory, snapshot, doomed))
        if SNAPSHOTS_OF_OURS.fullmatch(mark):
            needless = readers <= 1  # the blocks of one with a single reader become that one's
        else:
            needless = readers == 0 and (owner == volume.name
                                         or not inventory.has(snapshot.pool, owner))  # fmt: skip
        if needless:
            doomed.append(snapshot)
    for each in doomed:
        _plan_delete(plan, client, each)


def _readers(inventory: Inventory, snapshot: Disk, doomed: Sequence[Disk]) -> list[Disk]:
    """Who reads from a snapshot when the doomed are gone: those above one of them move down."""
    found = []
    for child in inventory.children(snapshot):
        found += _readers(inventory, child, doomed) if child in doomed else [child]
    return found


def plan_closing_of_image(plan: Plan, client: Client, image: Image) -> None:
    """Let the target close an image's file when the last volume that begins with it is gone."""
    plan.add(
        f"close the image '{image.name}', if no other disk begins with it",
        lambda: _close_image(client, image),
    )


def _close_image(client: Client, image: Image) -> None:
    inventory = read_inventory(client)
    bdev = bdev_of(image, inventory)
    if bdev is not None and not bdev.uses and not clones_of(image, inventory):
        call(client, "bdev_aio_delete", {"name": bdev.bdev})


def _plan_delete(plan: Plan, client: Client, volume: Disk) -> None:
    what = "snapshot" if volume.snapshot else "disk"
    plan.add(
        f"delete the {what} '{volume.name}' in pool '{volume.pool}'",
        lambda: call(client, "bdev_lvol_delete", {"name": volume.reference}),
    )


# ---- who writes ---------------------------------------------------------------------------------


def check_writers(vm: str, disk: DiskSpec, inventory: Inventory, vms: Sequence[Vm]) -> None:
    """Refuse a disk that somebody else has, unless all who have it say ``shared``.

    ``vms`` are all VMs; also ``vm`` itself, if it has other disks.
    Raises: InUse, naming the holder; NotFound; UsageError.
    """
    assert disk.bdev is not None
    there = inventory.disk(disk.bdev)
    if there.snapshot:
        raise UsageError(
            f"'{disk.bdev}' is a snapshot, which nobody may write to",
            hint=f"drivebay disk clone {there.reference} NEW, and use that",
        )
    if there.claimed:
        raise InUse(
            f"another bdev stands on '{disk.bdev}', and is destroyed by a second writer",
            hint="drivebay disk list shows what a VM can have",
        )
    known = {controller_name(vm, disk.name)}
    for holder in vms:
        for held in holder.spec.disks:
            if (holder.name, held.name) == (vm, disk.name):
                continue
            if held.bdev is None or not _same(inventory, held.bdev, there.bdev):
                continue
            if not (disk.shared and held.shared):
                raise InUse(
                    f"disk '{disk.bdev}' belongs to VM '{holder.name}' (its disk "
                    f"'{held.name}'): two writers destroy a file system",
                    hint=f"drivebay disk clone {there.reference} NEW makes one of its own; or "
                    f"set 'shared = true' for it in the vm.toml of both VMs",
                )
            known.add(controller_name(holder.name, held.name))
    for use in there.uses:
        # Also that of a VM which was started before its vm.toml named another disk.
        if use.sessions and use.controller not in known and not disk.shared:
            raise InUse(
                f"disk '{disk.bdev}' is in use: controller '{use.controller}' has "
                f"{use.sessions} connected session{'s' * (use.sessions > 1)}",
                hint="disconnect that one first; or, if it may write at the same time, say so: "
                "'shared = true' (--disk bdev=…,shared)",
            )


def inventory_when_let_go(client: Client, vm: str, disks: Sequence[DiskSpec]) -> Inventory:
    """What the target shows when no machine is connected to the sockets of a VM that is off.

    A QEMU that has just ended lets go a moment later. One that libvirt started does not, nor one
    of which no record is left (the tool was killed while it started it): there is no second one.
    Raises: InUse, NotFound.
    """
    deadline = time.monotonic() + LETTING_GO_SECONDS
    while True:
        inventory = read_inventory(client)
        ours = {controller_name(vm, disk.name) for disk in disks}
        held = [
            use.controller
            for disk in inventory.volumes
            for use in disk.uses
            if use.sessions and use.controller in ours
        ]
        if not held:
            return inventory
        if time.monotonic() > deadline:
            raise InUse(
                f"VM '{vm}' is off, and yet a machine is connected to its controller '{held[0]}': "
                "a QEMU that libvirt started, or that nobody has written down",
                hint=f"virsh list, or pgrep -af guest={vm}, shows it: end that one first",
            )
        time.sleep(_LOOK_EVERY_S)


def _same(inventory: Inventory, name: str, bdev: str) -> bool:
    try:
        return inventory.disk(name).bdev == bdev
    except (NotFound, UsageError):
        return False


# ---- controllers --------------------------------------------------------------------------------


def ensure_controller(
    client: Client,
    vm: str,
    disk: DiskSpec,
    inventory: Inventory,
    uid: int | None,
    cpumask: str | None = None,
) -> Path:
    """Offer a disk on its socket, which ``uid`` may use; return the socket's path.

    One that is there already, and is as it should be, stays. Raises: InUse, StateError.
    """
    assert disk.bdev is not None
    name = controller_name(vm, disk.name)
    bdev = inventory.disk(disk.bdev).bdev
    shown = _controller(client, name)
    if shown is not None and not _fits(shown, bdev, uid, cpumask):
        if shown["sessions"]:
            raise InUse(
                f"controller '{name}' is in use, and shows another disk than VM '{vm}' has now",
                hint=f'drivebay rpc vhost_delete_controller \'{{"ctrlr": "{name}"}}\'',
            )
        call(client, "vhost_delete_controller", {"ctrlr": name})
        shown = None
    if shown is None:
        wanted: dict[str, Any] = {"ctrlr": name, "dev_name": bdev, "serial": disk.name}
        if uid is not None:
            wanted["socket_uid"] = uid
        if cpumask is not None:
            wanted["cpumask"] = cpumask
        call(client, "vhost_create_blk_controller", wanted)
        shown = _controller(client, name)
        assert shown is not None
    socket = Path(shown["socket"])
    if uid is not None:
        check_way(socket, uid)
    return socket


def offer(
    client: Client, vm: str, disks: Sequence[DiskSpec], cpumask: str | None = None
) -> dict[str, Path]:
    """Offer all disks of a VM that the target has, to QEMU's user; return the sockets.

    Raises: as `ensure_controller`.
    """
    identity = unprivileged()
    uid = None if identity is None else identity.uid
    inventory = read_inventory(client)
    return {
        disk.name: ensure_controller(client, vm, disk, inventory, uid, cpumask)
        for disk in disks
        if disk.bdev is not None
    }


def plan_offer(plan: Plan, client: Client, spec: VmSpec) -> None:
    """Offer the disks of a new VM, so that libvirt may start it, too."""
    served = [disk for disk in spec.disks if disk.bdev is not None]

    def withdraw() -> None:
        for disk in served:
            remove_controller(client, spec.name, disk.name, force=True)

    if served:
        plan.add(
            f"offer the disks of VM '{spec.name}' on sockets",
            lambda: _offer_all(client, spec, served, withdraw),
            withdraw,
        )


def _offer_all(
    client: Client, spec: VmSpec, served: Sequence[DiskSpec], withdraw: Callable[[], None]
) -> None:
    """All or none."""
    try:
        offer(client, spec.name, served)
    except BaseException:
        withdraw()
        raise


def remove_controller(client: Client, vm: str, disk: str, *, force: bool = False) -> None:
    """Take a disk's socket away, if there is one. Raises: RpcRefused while a VM uses it."""
    name = controller_name(vm, disk)
    if _controller(client, name) is not None:
        call(client, "vhost_delete_controller", {"ctrlr": name, "force": force})


def _controller(client: Client, name: str) -> dict[str, Any] | None:
    shown = call(client, "vhost_get_controllers")
    return next((entry for entry in shown if entry["ctrlr"] == name), None)


def _fits(shown: dict[str, Any], bdev: str, uid: int | None, cpumask: str | None) -> bool:
    if shown["backend_specific"].get("block", {}).get("bdev") != bdev:
        return False
    if cpumask is not None and int(shown["cpumask"], 16) != int(cpumask, 16):
        return False
    try:
        owner = Path(shown["socket"]).stat().st_uid
    except OSError:
        return False
    return uid is None or owner == uid


def check_way(socket: Path, uid: int) -> None:
    """QEMU reconnects by the path, as its own user. Raises: StateError."""
    for folder in socket.parents:
        status = folder.stat()
        if status.st_uid != uid and not status.st_mode & 0o001:
            raise StateError(
                f"QEMU runs as user {uid}, who may not pass through the folder '{folder}' to the "
                f"socket '{socket.name}'",
                hint=f"chmod o+x {folder}; or start the target with -S in another folder"
                if os.access(folder, os.W_OK)
                else "start the target with -S in another folder",
            )
