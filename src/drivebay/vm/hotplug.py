"""Disks that come and go while a VM runs.

Context: a short-lived process, over the VM's monitor. Each disk needs a free PCIe root port
(or the SCSI bus), of which a machine has some spare from its start.
"""

from __future__ import annotations

from typing import Any, Final

from drivebay.errors import StateError
from drivebay.vm.command import Properties, disk_parts
from drivebay.vm.hardware import Disk
from drivebay.vm.qemu import Qemu
from drivebay.vm.qmp import Qmp, QmpRefused
from drivebay.vm.run import monitor
from drivebay.vm.store import Vm

__all__ = ["plug", "unplug"]

LETTING_GO_SECONDS: Final = 20.0


def plug(vm: Vm, qemu: Qemu, disk: Disk) -> None:
    """Add a disk to a running VM, or nothing. Raises: StateError, QmpRefused."""
    if disk.bus == "sata":
        raise StateError(
            "QEMU adds no SATA disk to a running machine",
            hint=f"stop VM '{vm.name}' first, or add it with bus=virtio",
        )
    with monitor(vm) as qmp:
        port = "" if disk.bus == "scsi" else _free_port(vm, qmp)
        undo: list[tuple[str, dict[str, Any]]] = []
        try:
            for kind, properties in disk_parts(qemu, disk, port):
                _add(qmp, kind, properties)
                undo.append(_removal(kind, properties))
        except QmpRefused:
            for command, arguments in reversed(undo):
                qmp.call(command, arguments)
            raise


def unplug(vm: Vm, name: str, bus: str) -> None:
    """Take a disk away from a running VM, whose guest has to let go of it.

    Raises: StateError when it does not; QmpRefused.
    """
    device = f"disk-{name}"
    with monitor(vm) as qmp:
        gone = qmp.call_and_wait(
            "device_del",
            {"id": device},
            "DEVICE_DELETED",
            lambda data: data.get("device") == device,
            LETTING_GO_SECONDS,
        )
        if not gone:
            raise StateError(
                f"the guest of VM '{vm.name}' did not let go of disk '{name}' within "
                f"{LETTING_GO_SECONDS:.0f} s",
                hint="unmount it there, and let the guest finish its start; then try again",
            )
        if bus == "virtio":
            qmp.call("chardev-remove", {"id": f"vhost-{name}"})
        else:
            qmp.call("blockdev-del", {"node-name": f"node-{name}"})


def _add(qmp: Qmp, kind: str, properties: Properties) -> None:
    match kind:
        case "chardev":
            seconds = {key: value for key, value in properties.items() if "reconnect" in key}
            address = {"type": "unix", "data": {"path": properties["path"]}}
            data = {"addr": address, "server": False, **seconds}
            qmp.call("chardev-add", id=properties["id"], backend={"type": "socket", "data": data})
        case "blockdev":
            qmp.call("blockdev-add", properties)
        case _:
            qmp.call("device_add", properties)


def _removal(kind: str, properties: Properties) -> tuple[str, dict[str, Any]]:
    match kind:
        case "chardev":
            return "chardev-remove", {"id": properties["id"]}
        case "blockdev":
            return "blockdev-del", {"node-name": properties["node-name"]}
        case _:
            return "device_del", {"id": properties["id"]}


def _free_port(vm: Vm, qmp: Qmp) -> str:
    """The first root port of ours with nothing behind it."""
    for bus in qmp.call("query-pci"):
        for device in bus["devices"]:
            name = str(device.get("qdev_id", ""))
            if name.startswith("port") and not device.get("pci_bridge", {}).get("devices"):
                return name
    raise StateError(
        f"VM '{vm.name}' has no free port for another disk until its next start",
        hint=f"drivebay vm restart {vm.name}, or detach a disk",
    )
