"""A VM from its vm.toml to a running QEMU and back, in the order in which things need each other.

Context: a short-lived process. Everything is checked before anything is made; the disks' sockets
come first (QEMU connects while it starts), then the seed, then QEMU.

    lock ─► QEMU there and able? ─► image unchanged, ISO there? ─► networks there? ─►
    target (started if need be) ─► writers? ─► sockets ─► seed ─► shared folders ─► TAPs ─►
    QEMU ─► vCPUs to their cores
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from drivebay.disks.connection import call
from drivebay.disks.inventory import Inventory
from drivebay.disks.starting import connect_or_start
from drivebay.errors import DrivebayError, HostError, InUse, NotFound, UsageError
from drivebay.system.files import write_private
from drivebay.system.processes import unprivileged
from drivebay.vm import cd, run
from drivebay.vm import placement as places
from drivebay.vm.assembly import Once, assemble
from drivebay.vm.disks import check_writers, inventory_when_let_go, offer
from drivebay.vm.images.store import Images
from drivebay.vm.iso import check_iso
from drivebay.vm.joining import check_joins, join, leave
from drivebay.vm.kvm import Accelerator, choose_accelerator
from drivebay.vm.qemu import Qemu, find_qemu
from drivebay.vm.shares import check_shares, serve_shares
from drivebay.vm.stillness import refuse_half_reverted
from drivebay.vm.store import Vm, Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = [
    "POWER_OFF_SECONDS",
    "BootFrom",
    "Started",
    "check_able",
    "check_cd",
    "check_image",
    "start",
    "stop",
    "write_seed",
]

POWER_OFF_SECONDS: Final = 90.0
_PRESS_EVERY_S: Final = 15.0


BootFrom = Literal["disk", "iso", "text"]


@dataclass(frozen=True)
class Started:
    """A VM that was started, and how long that took."""

    running: run.Running
    seconds: float


def start(
    vms: Vms, name: str, socket: str | None = None, *, boot_from: BootFrom = "disk"
) -> Started:
    """Start a VM, from its disk, or this time only from its CD.

    'iso' is until the guest reboots: then its disk is first again. 'text' starts the kernel of
    the installer on the CD, with a serial console: when the guest reboots, the machine ends.

    Raises: InUse, NotFound, UsageError, StateError, HostError, Unreachable.
    """
    began = time.monotonic()
    with vms.locked(name):
        vm = vms.load(name)
        if run.running(vm) is not None:
            raise InUse(f"VM '{name}' runs already", hint=f"drivebay vm info {name}")
        refuse_half_reverted(vm)
        qemu = find_qemu(vm.spec.qemu)
        check_able(vm, qemu)
        check_image(vm)
        check_cd(vm, needed=boot_from != "disk")
        check_shares(vm)
        leave(vm)
        check_joins(vm.spec.nets)
        accelerator = choose_accelerator()
        identity = unprivileged(Path("/dev/kvm") if accelerator.name == "kvm" else None)
        with ExitStack() as stack:
            once = _once(vm, boot_from, accelerator, stack)
            sockets, placement = _prepare_disks(vms, vm, socket)
            write_seed(vm)
            run.turn_over(vm.console_log)
            descriptors = run.Descriptors(vm, identity, stack)
            served = stack.enter_context(serve_shares(vm))
            taps = join(vm, descriptors, stack)
            connections = served.connections
            hardware = assemble(vm, descriptors, sockets, placement, connections, once, taps)
            inherited = [*descriptors.inherited, *served.connections.values()]
            found = run.launch(vm, qemu, accelerator, hardware, inherited, identity)
            served.let_go()
        if once.iso_first:
            cd.start_last(vm)
        _pin(vm, placement)
    return Started(found, time.monotonic() - began)


def stop(
    vms: Vms, name: str, *, force: bool = False, timeout_s: float = POWER_OFF_SECONDS
) -> str | None:
    """Ask a VM to switch itself off, and end it by force when it does not in time.

    Returns: how it ended, 'off' or 'by force'; None when it was not running.
    Raises: HostError, StateError when QEMU cannot be ended, or a downscript fails.
    """
    vm = run.load_running(vms, name)
    with vms.locked(name):
        found = run.running(vm)
        if found is None:
            leave(vm)
            return None
        by_itself = not force and _switched_off(vm, found, timeout_s)
        if not by_itself:
            run.end_by_force(vm, found)
        leave(vm)
        return "off" if by_itself else "by force"


def _switched_off(vm: Vm, found: run.Running, timeout_s: float) -> bool:
    """Press the button more than once: a guest that still starts does not listen to the first."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            run.press_power_button(vm)
        except DrivebayError:
            return run.wait_for_end(found, 0)  # a monitor that is silent: no guest will hear of it
        if run.wait_for_end(found, min(left, _PRESS_EVERY_S)):
            return True
    return False


# ---- the steps of a start -----------------------------------------------------------------------


def check_able(vm: Vm, qemu: Qemu) -> None:
    """Raises: NotFound for what this QEMU lacks; UsageError for a machine that it does not know."""
    spec = vm.spec
    what = f"VM '{vm.name}'"
    qemu.require("memfd", what)
    if spec.shares:
        qemu.require("vhost-user-fs", f"{what} with --share")
    if any(net.kind == "user" for net in spec.nets):
        qemu.require("user-net", f"{what} with --net user")
    if any(net.model == "e1000" for net in spec.nets):
        qemu.require("e1000", f"{what} with model=e1000")
    for disk in spec.disks:
        bus = spec.bus_of(disk)
        if disk.bdev is not None and bus == "virtio":
            qemu.require("vhost-user-blk", what)
        elif disk.bdev is not None:
            qemu.require("vhost-user-block-driver", f"{what} with --bus {bus}")
        if bus in ("nvme", "scsi"):
            qemu.require(bus, f"{what} with --bus {bus}")
        elif bus == "sata":
            qemu.require("ahci", f"{what} with --bus sata")
    if spec.machine not in qemu.machines:
        raise UsageError(
            f"{what} was made as a '{spec.machine}', which '{qemu.path}' (QEMU "
            f"{qemu.spelled_version}) does not know",
            hint=f"start it with the QEMU that made it (drivebay vm set {vm.name} --qemu PATH); or "
            f"drivebay vm set {vm.name} --machine {qemu.machine}, which changes its hardware",
        )


def check_image(vm: Vm) -> None:
    """Raises: StateError when the image below the VM's disks was changed; NotFound."""
    spec = vm.spec
    if spec.image is None or not any(disk.made for disk in spec.disks):
        return
    try:
        image = Images().get(spec.image)
    except NotFound as error:
        if any(disk.overlay is not None for disk in spec.disks):
            raise NotFound(
                f"the image '{spec.image}' of VM '{vm.name}' is gone, and its disk is an overlay "
                "on it",
                hint="import it again under the same name, with the same content",
            ) from error
        return  # the target knows better whether a volume still needs it
    image.check_unchanged()


def check_cd(vm: Vm, *, needed: bool = False) -> None:
    """Raises: HostError, UsageError for an ISO that is gone or none, or if it is ``needed``."""
    if vm.spec.iso is None:
        if needed:
            raise UsageError(
                f"VM '{vm.name}' has no ISO to start from",
                hint=f"drivebay vm set {vm.name} --iso FILE",
            )
        return
    try:
        check_iso(Path(vm.spec.iso))
    except DrivebayError as error:
        error.hint = f"without it: drivebay vm eject {vm.name}"
        raise


def _once(vm: Vm, boot_from: BootFrom, accelerator: Accelerator, stack: ExitStack) -> Once:
    """How this start differs from others; QEMU has read the kernel when it answers."""
    if boot_from != "text":
        return Once(iso_first=boot_from == "iso")
    from drivebay.vm.installer import take_out

    assert vm.spec.iso is not None, "check_cd"
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".installer-", dir=vm.folder))
    boot = take_out(Path(vm.spec.iso), Path(folder))
    if accelerator.name == "tcg":
        # An emulated processor may be too late for the kernel's test of its timer, which is fatal.
        boot = replace(boot, append=f"no_timer_check {boot.append}")
    return Once(boot=boot)


def _prepare_disks(
    vms: Vms, vm: Vm, socket: str | None
) -> tuple[dict[str, Path], places.Placement]:
    served = [disk for disk in vm.spec.disks if disk.bdev is not None]
    if not served:
        return {}, places.Placement()
    with connect_or_start(socket) as client:
        inventory = inventory_when_let_go(client, vm.name, served)
        everybody = [*vms.others(vm.name), vm]
        for disk in served:
            check_writers(vm.name, disk, inventory, everybody)
        placement = _place(client, inventory, vm)
        return offer(client, vm.name, served, placement.controller_mask), placement


def _place(client: Client, inventory: Inventory, vm: Vm) -> places.Placement:
    reactors: list[dict[str, Any]] = call(client, "framework_get_reactors")["reactors"]
    cores = {int(reactor["lcore"]) for reactor in reactors}
    node = None
    first = vm.spec.disks[0]
    if first.bdev is not None:
        place = _place_below(inventory, first.bdev)
        if place is not None:
            with contextlib.suppress(OSError):
                node = places.node_of(Path(place))
    return places.choose(places.read_host(), node, cores, vm.spec.cpus)


def _place_below(inventory: Inventory, name: str) -> str | None:
    """The file or device on which a disk lies."""
    disk = inventory.disk(name)
    if disk.pool is not None:
        return inventory.pool(disk.pool).place
    return disk.place


def write_seed(vm: Vm) -> None:
    """Write cloud-init's disk anew. Raises: UsageError, HostError."""
    spec = vm.spec
    if spec.cloud_init is None:
        return
    from drivebay.vm.seed import seed_iso
    from drivebay.vm.ssh import read_keys

    keys = read_keys(vm.keys)
    user_data = None
    if spec.cloud_init.user_data is not None:
        path = vm.folder / spec.cloud_init.user_data
        try:
            user_data = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HostError(
                f"can't read '{path}', the user-data of VM '{vm.name}'",
                getattr(error, "errno", None) or 0,
                path=str(path),
            ) from error
    write_private(vm.seed, seed_iso(spec, keys.login, keys.host, user_data))


def _pin(vm: Vm, placement: places.Placement) -> None:
    """Move the vCPUs to their cores; a VM that runs on others is better than none."""
    if not placement.vcpu_cores:
        return
    with contextlib.suppress(DrivebayError), run.monitor(vm) as qmp:
        threads = [int(entry["thread-id"]) for entry in qmp.call("query-cpus-fast")]
        places.pin(threads, placement)
