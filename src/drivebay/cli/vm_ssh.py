"""OpenSSH's programs, run for `drivebay vm ssh` and `vm cp`.

Context: a command in the foreground. ssh and scp are told where the VM is and how its guest is
recognized.
"""

from __future__ import annotations

import subprocess
from typing import Final

from drivebay.cli.output import DONE
from drivebay.errors import StateError
from drivebay.vm.spec import VmSpec
from drivebay.vm.ssh import read_banner
from drivebay.vm.store import Vm
from drivebay.vm.waiting import running_or_refuse, started_spec

__all__ = ["as_started", "run_ssh"]

_SSH_FAILED: Final = 255
_BANNER_SECONDS: Final = 5.0


def as_started(vm: Vm) -> VmSpec:
    """What a VM is as it runs. Raises: StateError."""
    return started_spec(vm, running_or_refuse(vm))


def run_ssh(vm: Vm, spec: VmSpec, command: list[str]) -> int:
    """Run ssh or scp; if it could not connect, say what the guest lacks."""
    try:
        code = subprocess.run(command).returncode
    except FileNotFoundError:
        raise StateError(
            f"there is no {command[0]} on this host",
            hint="sudo apt install openssh-client   (Fedora, AlmaLinux, openEuler: sudo dnf "
            "install openssh-clients)",
        ) from None
    if code != DONE and (code == _SSH_FAILED or command[0] == "scp"):
        read_banner(spec, _BANNER_SECONDS, vm.agent_socket)
    return code if code >= 0 else 128 - code
