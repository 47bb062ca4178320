"""The folders of the VMs: found, made at once or not at all, changed by one at a time.

Context: a short-lived process. Layout: docs/vms.md. What a VM is is written in its vm.toml
alone; nothing is remembered elsewhere, so a folder that a person copies or removes is a VM
more or less.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.disks.places import data_folder
from drivebay.errors import AlreadyExists, DrivebayError, NotFound
from drivebay.system.files import refusal, write_private
from drivebay.system.locks import held
from drivebay.vm.spec import VmSpec, check_vm_name
from drivebay.vm.spec_file import read_spec, write_spec

__all__ = ["RUNNING_FILE", "Vm", "Vms"]

RUNNING_FILE: Final = "running.json"
_SPEC: Final = "vm.toml"
_NEW: Final = ".new-"
_LEFT_SECONDS: Final = 86400.0  # a folder that is still unfinished then is nobody's


@dataclass(frozen=True)
class Vm:
    """One VM as its folder tells it; ``text`` is vm.toml's, from which ``spec`` was read."""

    folder: Path
    spec: VmSpec
    text: str

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def seed(self) -> Path:
        return self.folder / "seed.iso"

    @property
    def firmware_variables(self) -> Path:
        return self.folder / "vars.fd"

    @property
    def monitor_socket(self) -> Path:
        return self.folder / "monitor.sock"

    @property
    def console_socket(self) -> Path:
        return self.folder / "console.sock"

    @property
    def agent_socket(self) -> Path:
        return self.folder / "agent.sock"

    @property
    def console_log(self) -> Path:
        return self.folder / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.folder / "qemu.log"

    @property
    def running_file(self) -> Path:
        return self.folder / RUNNING_FILE

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    @property
    def unfinished_revert(self) -> Path:
        return self.folder / "unfinished-revert"


class Vms:
    """All VMs of this user, in ``folder``."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = data_folder() / "vms" if folder is None else folder

    def names(self) -> list[str]:
        """The VMs' names, sorted."""
        try:
            found = [path.parent.name for path in self.folder.glob(f"*/{_SPEC}")]
        except OSError as error:
            raise refusal("can't look into", self.folder, error) from error
        return sorted(name for name in found if not name.startswith("."))

    def load(self, name: str) -> Vm:
        """Read one. Raises: NotFound; UsageError when its vm.toml is wrong; HostError."""
        check_vm_name(name)
        path = self.folder / name / _SPEC
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise _no_such(name) from None
        except (OSError, UnicodeDecodeError) as error:
            raise refusal("can't read", path, error) from error
        try:
            return Vm(self.folder / name, read_spec(name, text), text)
        except DrivebayError as error:
            error.hint = error.hint or f"mend it: {path}"
            raise

    def all(self) -> list[Vm]:
        """Read all. Raises: as `load`, for the first that is wrong."""
        return [self.load(name) for name in self.names()]

    def others(self, name: str) -> list[Vm]:
        """Those beside ``name`` whose vm.toml can be read: one that is broken blocks no other."""
        found = []
        for other in self.names():
            with contextlib.suppress(DrivebayError):
                if other != name:
                    found.append(self.load(other))
        return found

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep all other changes of this VM away. Raises: InUse when one goes on; NotFound."""
        check_vm_name(name)
        if not (self.folder / name).is_dir():
            raise _no_such(name)
        busy = f"another command changes, starts or stops VM '{name}' right now"
        with held(self.folder / f".lock-{name}", busy):
            yield

    def check_free(self, name: str) -> None:
        """Raises: UsageError, AlreadyExists."""
        check_vm_name(name)
        if os.path.lexists(self.folder / name):
            raise _taken(name)

    def create(self, spec: VmSpec, fill: Callable[[Vm], None]) -> Vm:
        """Make a VM's folder; ``fill`` adds what else belongs into it.

        Raises: AlreadyExists, HostError, what ``fill`` raises; nothing is left then.
        """
        self.check_free(spec.name)
        self._make_folder()
        self._sweep()
        try:
            fresh = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.folder))
        except OSError as error:
            raise refusal("can't make a folder in", self.folder, error) from error
        try:
            text = write_spec(spec)
            write_private(fresh / _SPEC, text.encode())
            fill(Vm(fresh, spec, text))
            try:
                fresh.rename(self.folder / spec.name)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _taken(spec.name) from None  # somebody was quicker
                raise refusal("can't make", self.folder / spec.name, error) from error
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return Vm(self.folder / spec.name, spec, text)

    def save(self, vm: Vm, spec: VmSpec) -> Vm:
        """Write a changed vm.toml, whose comments stay. Raises: HostError."""
        text = write_spec(spec, vm.text)
        read_spec(spec.name, text)  # what we write, we can read
        write_private(vm.folder / _SPEC, text.encode())
        return Vm(vm.folder, spec, text)

    def delete(self, vm: Vm) -> None:
        """Remove a VM's folder and all that is in it. Raises: HostError.

        Of one that is a symbolic link only the link goes: what it leads to may be another VM's.
        """
        gone = self.folder / f"{_NEW}{vm.name}-deleted-{os.getpid()}"
        try:
            vm.folder.rename(gone)  # at once, so that no half of it is ever listed
            if gone.is_symlink():
                gone.unlink()
            else:
                shutil.rmtree(gone)
            (self.folder / f".lock-{vm.name}").unlink(missing_ok=True)
        except OSError as error:
            raise refusal("can't remove", vm.folder, error) from error

    def _sweep(self) -> None:
        """Remove what commands that were killed have left: it has keys in it."""
        for path in self.folder.glob(f"{_NEW}*"):
            with contextlib.suppress(OSError):
                # A rename is a change, too, so that one that is being deleted is young.
                if path.lstat().st_ctime < time.time() - _LEFT_SECONDS:
                    shutil.rmtree(path)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise refusal("can't make", self.folder, error) from error


def _no_such(name: str) -> NotFound:
    return NotFound(f"there is no VM '{name}'", hint="drivebay vm list")


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(f"there is a VM '{name}' already", hint=f"drivebay vm info {name}")
