"""QEMU and KVM: is there one, what can it, and do guests run at full speed?

Context: a short-lived process; may start QEMU and, once after a boot, a trial guest.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from drivebay.errors import NotFound
from drivebay.host.finding import Finding, failed
from drivebay.vm.kvm import Accelerator, choose_accelerator
from drivebay.vm.packages import everywhere, install_command
from drivebay.vm.qemu import FEATURES, Qemu, find_qemu

__all__ = ["check_emulator"]

# feature: how bad it is without, and what is lost.
_WITHOUT: Final = {
    "vhost-user-blk": ("problem", "no VM can have disks of the target"),
    "memfd": ("problem", "no guest can share its memory with the target"),
    "seccomp": ("problem", "no VM starts, since none runs without the sandbox"),
    "user-net": ("problem", "VMs need --net none"),
    "vhost-user-block-driver": ("note", "no VM can have --bus scsi, nvme or sata"),
    "vhost-user-fs": ("note", "no VM can have a shared folder"),
    "nvme": ("note", "no VM can have --bus nvme"),
    "scsi": ("note", "no VM can have --bus scsi"),
    "ahci": ("note", "no VM can have --bus sata"),
}


def check_emulator(name: str | None = None) -> Iterator[Finding]:
    """Check the QEMU of that name, or the one that VMs get by default."""
    try:
        qemu = find_qemu(name)
    except NotFound as error:
        finding = failed("qemu", error)
        lacking = name is None and install_command("qemu") is None
        mend = f"install QEMU: {everywhere('qemu')}" if lacking else finding.mend
        yield Finding("problem", "qemu", finding.what, mend)
        return
    yield Finding(
        "ok",
        "qemu",
        f"QEMU {qemu.spelled_version} at {qemu.path}; a new VM is a {qemu.machine}",
    )
    yield from _check_features(qemu)
    yield _check_kvm(qemu, choose_accelerator())


def _check_features(qemu: Qemu) -> Iterator[Finding]:
    for feature, (level, loss) in _WITHOUT.items():
        need, part, _ = FEATURES[feature]
        try:
            qemu.require(feature, "a VM")
        except NotFound as error:
            mend = error.hint or ""
            if install_command(part) is None:
                mend = f"{mend}; it comes with {everywhere(part)}"
            yield Finding(level, "qemu", f"without {need}: {loss}", mend)
        else:
            yield Finding("ok", "qemu", need)


def _check_kvm(qemu: Qemu, accelerator: Accelerator) -> Finding:
    if accelerator.name not in qemu.features:
        return Finding(
            "problem",
            "kvm",
            f"guests would run by {accelerator.name} ({accelerator.reason}), for which "
            f"'{qemu.path}' was not built",
            "name another QEMU: DRIVEBAY_QEMU=PATH",
        )
    if accelerator.name == "kvm":
        return Finding("ok", "kvm", f"KVM works: {accelerator.reason}")
    return Finding(
        "warning",
        "kvm",
        f"guests are emulated, and slow: {accelerator.reason}",
        _mend_of_kvm(),
    )


def _mend_of_kvm(device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if platform.machine() != "x86_64":
        return "use a host with an x86_64 processor"
    flags = cpuinfo.read_text(errors="replace").split()
    if device.exists():
        if {"vmx", "svm"} & set(flags):
            return "sudo usermod -aG kvm $USER; then log in again"
        return "none in a virtual machine, unless its own host allows nested KVM"
    if "vmx" in flags:
        return "sudo modprobe kvm_intel"
    if "svm" in flags:
        return "sudo modprobe kvm_amd"
    return "turn on virtualization in the firmware's setup (VT-x or AMD-V)"
