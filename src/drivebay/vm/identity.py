"""What makes a VM itself and no other: MAC addresses, uuid, instance id; new ones for a clone.

Context: any; pure but for `host_machine_id`.

A MAC address is a hash of where the VM lives, so that two hosts on one network do not give
the same one by chance. It is stored when the VM is made, and stays when the VM is renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from drivebay.errors import HostError
from drivebay.vm.spec import NetSpec, VmSpec

__all__ = [
    "NEW_MACHINE_ID",
    "Origin",
    "free_mac",
    "host_machine_id",
    "mac_address",
    "new_identity",
    "new_instance_id",
    "new_uuid",
]

QEMU_PREFIX: Final = "52:54:00"
_MACHINE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MACHINE_ID_FILE: Final = Path("/etc/machine-id")

# The guest's part, for its root's shell. Programs read the file whenever they need it, so what
# starts later sees the new id. On the first start of an image without an id the file is a
# read-only mount that systemd itself has just made: nothing to do then.
NEW_MACHINE_ID: Final = (
    "mountpoint -q /etc/machine-id && exit 0; "
    "rm -f /var/lib/dbus/machine-id; : > /etc/machine-id && systemd-machine-id-setup; "
    "ln -sf /etc/machine-id /var/lib/dbus/machine-id 2>/dev/null; exit 0"
)


@dataclass(frozen=True)
class Origin:
    """Where VMs are made: the host and the folder that has their folders."""

    machine_id: str
    folder: Path


def mac_address(origin: Origin, name: str, index: int, attempt: int = 0) -> str:
    """Return the address of a VM's interface.

    >>> mac_address(Origin("0" * 32, Path("/vms")), "web", 0)
    '52:54:00:a1:17:42'
    """
    parts = [origin.machine_id, str(origin.folder), name, str(index)]
    if attempt:
        parts.append(str(attempt))
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return f"{QEMU_PREFIX}:{digest[:3].hex(':')}"


def free_mac(origin: Origin, name: str, index: int, taken: Collection[str]) -> str:
    """Return the address of a VM's interface, another one if somebody has that already."""
    attempt = 0
    while (mac := mac_address(origin, name, index, attempt)) in taken:
        attempt += 1
    return mac


def new_uuid() -> str:
    """Return the uuid of a new VM, which its guest sees in the firmware's tables."""
    return str(uuid.uuid4())


def new_instance_id() -> str:
    """Return what tells a guest's cloud-init that it is a machine of its own."""
    return f"drivebay-{uuid.uuid4()}"


def new_identity(
    spec: VmSpec, name: str, origin: Origin, taken: Collection[str], *, forwards: bool = False
) -> VmSpec:
    """Return ``spec`` as another VM called ``name``.

    A host name that a person chose stays; one that was the VM's name follows it. Forwards are
    left out unless asked for: the original has those ports of the host. It starts with no host
    and belongs to no lab.
    """
    used = set(taken) | {net.mac for net in spec.nets}
    nets: list[NetSpec] = []
    for index, net in enumerate(spec.nets):
        mac = free_mac(origin, name, index, used)
        used.add(mac)
        nets.append(replace(net, mac=mac, forward=net.forward if forwards else ()))
    cloud_init = spec.cloud_init
    if cloud_init is not None:
        hostname = name if cloud_init.hostname == spec.name else cloud_init.hostname
        cloud_init = replace(cloud_init, instance_id=new_instance_id(), hostname=hostname)
    return replace(
        spec,
        name=name,
        uuid=new_uuid(),
        nets=tuple(nets),
        cloud_init=cloud_init,
        autostart=False,
        lab=None,  # whose file knows nothing of it
    )


def host_machine_id(data: Path) -> str:
    """Return the host's machine-id; on a host without one (a container), one kept in ``data``.

    Raises: HostError.
    """
    kept = data / "machine-id"
    for path in (_MACHINE_ID_FILE, kept):
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="ascii", errors="replace").strip()
            if _MACHINE_ID.fullmatch(text):
                return text
    made = uuid.uuid4().hex
    fresh = data / f".machine-id.{os.getpid()}"
    try:
        data.mkdir(mode=0o711, parents=True, exist_ok=True)
        fresh.write_text(made + "\n", encoding="ascii")
        fresh.replace(kept)
    except OSError as error:
        raise HostError(
            f"there is no {_MACHINE_ID_FILE}, and can't keep one in '{kept}'",
            error.errno or 0,
            path=str(kept),
        ) from error
    return made
