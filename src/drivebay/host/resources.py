"""Memory and limits of this process: is there room for the VMs that there are?

Context: a short-lived process; reads /proc.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from drivebay.disks.sizes import format_size
from drivebay.host.finding import Finding
from drivebay.vm.run import running
from drivebay.vm.store import Vm

__all__ = ["available_memory", "check_memory", "memory_finding"]

_MEMORY: Final = Path("/proc/meminfo")
_FILES_LEAST: Final = 1024


def available_memory(meminfo: Path = _MEMORY) -> int:
    """Bytes that programs can still get without anything being swapped out."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def check_memory(vms: Sequence[Vm], meminfo: Path = _MEMORY) -> Iterator[Finding]:
    """Check what is free against the VMs that do not run, and the limits on this process."""
    free = available_memory(meminfo)
    waiting = [vm for vm in vms if running(vm) is None]
    for vm in waiting:
        if vm.spec.memory > free:
            yield memory_finding(vm, free)
    wanted = sum(vm.spec.memory for vm in waiting)
    what = f"{format_size(free)} of memory is free"
    if not waiting:
        yield Finding("ok", "memory", what)
    elif wanted <= free:
        yield Finding("ok", "memory", f"{what}; the VMs that do not run have {format_size(wanted)}")
    elif len(waiting) > 1:
        yield Finding(
            "note",
            "memory",
            f"{what}, and the VMs that do not run have {format_size(wanted)} together: not all "
            "can be started",
        )
    yield from _check_limits()


def memory_finding(vm: Vm, free: int) -> Finding:
    """Whether one VM that does not run has room."""
    wanted = format_size(vm.spec.memory)
    if vm.spec.memory <= free:
        return Finding(
            "ok", "memory", f"VM '{vm.name}' has {wanted}, and {format_size(free)} is free"
        )
    return Finding(
        "warning",
        "memory",
        f"VM '{vm.name}' has {wanted} of memory, and {format_size(free)} is free: it may be ended "
        "in the midst of its work",
        f"drivebay vm set {vm.name} --memory {max(free // 2 >> 20, 16)}M",
    )


def _check_limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FILES_LEAST:
        yield Finding(
            "warning",
            "limits",
            f"a process may open {files} files, and a target with many disks opens more",
            f"ulimit -n {_FILES_LEAST if most == resource.RLIM_INFINITY else most}",
        )
    else:
        yield Finding("ok", "limits", f"a process may open {files} files")
