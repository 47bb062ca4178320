"""Where this host keeps UEFI for its VMs.

Context: any. Each distribution has its own place for the code and the empty variables.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, NotFound
from drivebay.vm.packages import install_command

__all__ = ["find_uefi", "make_variables"]

_PLACES: Final = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),  # Debian, Ubuntu
    ("/usr/share/edk2/ovmf/OVMF_CODE_4M.raw.fd", "/usr/share/edk2/ovmf/OVMF_VARS_4M.raw.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora, openEuler
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch
)


def find_uefi() -> tuple[Path, Path]:
    """The firmware's code and its variables as they are at first. Raises: NotFound."""
    for code, variables in _PLACES:
        if Path(code).is_file() and Path(variables).is_file():
            return Path(code), Path(variables)
    raise NotFound("there is no UEFI for VMs on this host", hint=install_command("ovmf"))


def make_variables(path: Path) -> None:
    """Copy the empty variables for a new VM. Raises: NotFound, HostError."""
    _, variables = find_uefi()
    try:
        shutil.copyfile(variables, path)
        path.chmod(0o600)
    except OSError as error:
        raise HostError(f"can't make '{path}'", error.errno or 0, path=str(path)) from error
