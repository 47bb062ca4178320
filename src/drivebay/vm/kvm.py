"""Which accelerator a guest gets: KVM when a short trial shows that it works, else TCG.

Context: any process but never the target; takes at most PROBE_SECONDS the first time
after a boot of the host, and reads one small file after that.

    no /dev/kvm ─────────────────────────────────────► tcg
    kvm_pvm loaded, or processor without vmx/svm ────► tcg   (known to hang guests)
    no right to open /dev/kvm ───────────────────────► tcg
    the trial of ``kvm_probe`` fails, or hangs ──────► tcg
    otherwise ───────────────────────────────────────► kvm
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from drivebay.system.processes import boot_id
from drivebay.vm.places import cache_folder, remember

__all__ = ["Accelerator", "choose_accelerator", "static_objection"]

PROBE_SECONDS = 2.0
MEMORY = "accelerator.json"


@dataclass(frozen=True)
class Accelerator:
    """``name`` is what QEMU's ``-accel`` takes, ``reason`` is for people."""

    name: str
    reason: str


def choose_accelerator() -> Accelerator:
    """Return the accelerator for guests of this user on this host, with the reason."""
    objection = static_objection()
    if objection is not None:
        return Accelerator("tcg", objection)
    key = f"{boot_id()} uid {os.getuid()}"
    known = _remembered(key)
    if known is not None:
        return known
    found = _probe()
    remember(MEMORY, json.dumps({"key": key, **asdict(found)}))
    return found


def static_objection(
    device: str = "/dev/kvm", cpuinfo: str = "/proc/cpuinfo", modules: str = "/sys/module"
) -> str | None:
    """Say why KVM cannot serve, from what the host shows without running anything."""
    if platform.machine() != "x86_64":
        return f"the guest is for x86_64, this host is {platform.machine()}"
    if not Path(device).exists():
        return f"no {device}"
    if Path(modules, "kvm_pvm").exists():
        return f"{device} belongs to kvm_pvm, under which guests hang"
    flags: set[str] = set()
    for line in Path(cpuinfo).read_text(errors="replace").splitlines():
        if line.startswith("flags"):
            flags.update(line.split())
            break
    if not flags & {"vmx", "svm"}:
        return "the processor shows neither vmx nor svm"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"no permission to open {device} (is this user in the group 'kvm'?)"
    if os.geteuid() == 0 and (Path(device).stat().st_mode & 0o060) != 0o060:
        return f"the group of {device} may not open it, and QEMU does not run as root"
    return None


def _remembered(key: str) -> Accelerator | None:
    try:
        saved = json.loads((cache_folder() / MEMORY).read_text())
        if saved["key"] == key:
            return Accelerator(str(saved["name"]), str(saved["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _probe() -> Accelerator:
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("kvm_probe.py"))]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Accelerator("tcg", f"/dev/kvm hung a trial guest for {PROBE_SECONDS:g} s")
    if done.returncode != 0:
        return Accelerator("tcg", done.stderr.strip() or "the trial guest failed under /dev/kvm")
    return Accelerator("kvm", "a trial guest ran at full speed")
