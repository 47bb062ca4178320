"""A VM's QEMU: started, found again, asked to end, and ended.

Context: a short-lived process; QEMU outlives it. Started by root, QEMU is an unprivileged user
who may open nothing in the VM's folder: each file and each listening socket is opened here, and
handed over as a descriptor.

    stopped ── start ──► QEMU runs ── stop: power button, then by force ──► stopped
       ▲                     │
       └── the guest switches itself off, or QEMU dies: `running` finds no process
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from drivebay.errors import HostError, InUse, PeerError, StateError, UsageError
from drivebay.system.files import write_private
from drivebay.system.processes import Child, Identity, start, start_ticks
from drivebay.vm.command import command_line
from drivebay.vm.hardware import Hardware, Listener, check_socket_path
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu
from drivebay.vm.qmp import Qmp
from drivebay.vm.spec import DiskSpec, VmSpec
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.store import RUNNING_FILE, Vm, Vms
from drivebay.vm.vnc import CERTIFICATES, check_certificates, read_password

__all__ = [
    "Descriptors",
    "Running",
    "end_by_force",
    "launch",
    "load_running",
    "monitor",
    "note_disk",
    "note_eject",
    "press_power_button",
    "running",
    "turn_over",
    "wait_for_end",
]

ANSWER_SECONDS: Final = 30.0
END_SECONDS: Final = 10.0
_LOOK_EVERY_S: Final = 0.02


@dataclass(frozen=True)
class Running:
    """A QEMU that runs a VM, and the vm.toml that it was started with."""

    pid: int
    start_ticks: int
    accelerator: str
    qemu: str
    text: str

    def alive(self) -> bool:
        """Whether it is still there."""
        return start_ticks(self.pid) == self.start_ticks


def running(vm: Vm) -> Running | None:
    """The VM's QEMU, if it lives."""
    try:
        record = json.loads(vm.running_file.read_text(encoding="utf-8"))
        found = Running(**record)
        # Of a process that is gone nothing is known, which null would be equal to.
        return found if record["start_ticks"] is not None and found.alive() else None
    except (OSError, ValueError, TypeError):
        return None  # never started, or a record that nobody can use


def load_running(vms: Vms, name: str) -> Vm:
    """A VM as its vm.toml says; as it was started, when a person has broken that file since.

    Raises: as `Vms.load`.
    """
    try:
        return vms.load(name)
    except UsageError:
        folder = vms.folder / name
        try:
            text = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))["text"]
            started = Vm(folder, read_spec(name, text), text)
        except (OSError, ValueError, TypeError, KeyError, UsageError):
            started = None
        if started is None or running(started) is None:
            raise
        return started


def monitor(vm: Vm, timeout_s: float = ANSWER_SECONDS) -> Qmp:
    """Connect to a running VM's monitor. Raises: StateError, HostError, PeerError."""
    try:
        return Qmp(vm.monitor_socket, timeout_s)
    except OSError as error:
        raise StateError(
            f"the monitor of VM '{vm.name}' does not answer: {error.strerror or error}",
            hint=f"drivebay vm info {vm.name}",
        ) from error


# ---- starting -----------------------------------------------------------------------------------


class Descriptors:
    """What QEMU inherits: files by fdset, and sockets that listen; closed here afterwards.

    ``owner`` is QEMU's user, None if it is ours.
    """

    def __init__(self, vm: Vm, owner: Identity | None, stack: ExitStack) -> None:
        self._vm, self._owner, self._stack = vm, owner, stack
        self._sets: list[tuple[int, int]] = []
        self._all: list[int] = []
        self._last_set = 0

    @property
    def files(self) -> Sequence[tuple[int, int]]:
        """(descriptor, number of its fdset), as Hardware wants them."""
        return tuple(self._sets)

    @property
    def inherited(self) -> Sequence[int]:
        return tuple(self._all)

    def file(self, path: Path, flags: int = os.O_RDONLY) -> str:
        """Open a file for QEMU; return the name by which it opens it. Raises: HostError.

        QEMU takes from a set the descriptor whose mode it wants: it looks at a file that it
        will write to by reading it first.
        """
        self._last_set += 1
        for mode in {flags, os.O_RDONLY} if flags == os.O_RDWR else {flags}:
            try:
                descriptor = os.open(path, mode | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise HostError(
                    f"can't open '{path}' for VM '{self._vm.name}'",
                    error.errno or 0,
                    path=str(path),
                ) from error
            self.inherit(descriptor)
            self._sets.append((descriptor, self._last_set))
        return f"/dev/fdset/{self._last_set}"

    def readable(self, path: Path) -> str:
        """A file that QEMU can open only by a name of the file system: a kernel, an initrd.

        If that user may not read it, a copy without a name is handed over.
        """
        if self._owner is None:
            return str(path)
        try:
            with path.open("rb") as source:
                return self._copy(source)
        except OSError as error:
            raise HostError(
                f"can't read '{path}' for VM '{self._vm.name}'", error.errno or 0, path=str(path)
            ) from error

    def secret(self, path: Path) -> str:
        """A password, as QEMU takes it: without the line's end. Raises: UsageError, HostError."""
        return self._copy(io.BytesIO(read_password(path)))

    def certificates(self, folder: Path) -> str:
        """A folder with copies that QEMU's user may read; they are gone when it has started.

        Raises: HostError.
        """
        check_certificates(folder)
        copies = Path(
            self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".vnc-", dir=self._vm.folder)
            )
        )
        for name in CERTIFICATES:
            copy = copies / name
            shutil.copyfile(folder / name, copy)
            copy.chmod(0o600)
            if self._owner is not None:
                self._owner.take(copy)
        if self._owner is not None:
            self._owner.take(copies)
        descriptor = os.open(copies, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.inherit(descriptor)
        return f"/proc/self/fd/{descriptor}"

    def inherit(self, descriptor: int) -> None:
        """Hand over a descriptor that is open; it is closed here when QEMU has it."""
        self._stack.callback(os.close, descriptor)
        self._all.append(descriptor)

    def _copy(self, source: BinaryIO) -> str:
        """A file without a name that only QEMU's user may read."""
        copy = tempfile.TemporaryFile(dir=self._vm.folder)  # noqa: SIM115
        self._stack.enter_context(copy)
        shutil.copyfileobj(source, copy)
        copy.flush()
        if self._owner is not None:
            os.fchown(copy.fileno(), self._owner.uid, self._owner.gid)
        self._all.append(copy.fileno())
        return f"/proc/self/fd/{copy.fileno()}"

    def listener(self, path: Path, log: Path | None = None) -> Listener:
        """A socket that only we may connect to, and QEMU serves. Raises: HostError."""
        check_socket_path(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._stack.enter_context(listening)
        try:
            path.unlink(missing_ok=True)
            os.fchmod(listening.fileno(), 0o600)
            listening.bind(str(path))
            path.chmod(0o600)
            listening.listen(1)
        except OSError as error:
            raise HostError(
                f"can't make the socket '{path}'", error.errno or errno.EIO, path=str(path)
            ) from error
        self._all.append(listening.fileno())
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return Listener(listening.fileno(), None if log is None else self.file(log, flags))


def launch(
    vm: Vm,
    qemu: Qemu,
    accelerator: Accelerator,
    hardware: Hardware,
    inherited: Sequence[int],
    identity: Identity | None,
) -> Running:
    """Start QEMU and wait until its monitor answers. Raises: StateError with QEMU's own words."""
    if running(vm) is not None:
        raise InUse(f"VM '{vm.name}' runs already", hint=f"drivebay vm info {vm.name}")
    line = command_line(qemu, accelerator, hardware)

    noted: list[Running] = []

    def note(pid: int) -> None:
        """Before it begins: a QEMU that nobody knows of would keep its disks for ever."""
        found = Running(pid, start_ticks(pid) or 0, accelerator.name, str(qemu.path), vm.text)
        noted.append(found)
        _write_record(vm, found)

    try:
        vm.running_file.unlink(missing_ok=True)
        turn_over(vm.qemu_log)
        child = start("qemu", line, vm.qemu_log, pass_fds=inherited, identity=identity,
                      outlives_us=True, noted=note)  # fmt: skip
    except OSError as error:  # also when there is no shell
        what = f"can't start QEMU of VM '{vm.name}' ('{error.filename}')"
        raise HostError(what, error.errno or errno.EIO) from error
    try:
        _wait_for_monitor(vm, child)
        child.let_go()
    except BaseException:
        child.stop()
        vm.running_file.unlink(missing_ok=True)
        raise
    return noted[0]


def _wait_for_monitor(vm: Vm, child: Child) -> None:
    """Its socket listens since before it began: it answers as soon as it can, or ends."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        if child.ended():
            raise StateError(
                f"QEMU did not start VM '{vm.name}': {_own_words(child)}", hint=_mend(vm, child)
            )
        try:
            with Qmp(vm.monitor_socket, timeout_s=1.0) as qmp:
                qmp.call("query-status")
                return
        except (OSError, HostError, PeerError):  # not up yet, or just gone
            if time.monotonic() > deadline:
                raise StateError(
                    f"QEMU of VM '{vm.name}' did not answer within {ANSWER_SECONDS:.0f} s, and "
                    "was ended",
                    hint=f"its log: {vm.qemu_log}",
                ) from None
            time.sleep(_LOOK_EVERY_S)


def _own_words(child: Child) -> str:
    words = child.last_words()
    return words.partition("qemu-system-x86_64: ")[2] or words


def _mend(vm: Vm, child: Child) -> str:
    words = child.last_words()
    if "Could not set up host forwarding rule" in words:
        return (
            "that port is in use, or is below 1024, which QEMU without root may not take: "
            f"drivebay vm set {vm.name} --forward HOSTPORT:GUESTPORT"
        )
    if "-vnc" in words and "Address already in use" in words:
        return f"another program has that port: drivebay vm set {vm.name} --vnc ADDRESS:PORT"
    if "Cannot allocate memory" in words or "cannot set up guest memory" in words:
        return f"drivebay vm set {vm.name} --memory SIZE; free memory: drivebay doctor"
    return f"its log: {vm.qemu_log}"


def note_disk(vm: Vm, name: str, disk: DiskSpec | None) -> None:
    """A running machine has got a disk, or lost it (None): nobody has to restart it for that."""

    def changed(started: VmSpec) -> VmSpec:
        disks = tuple(each for each in started.disks if each.name != name)
        return replace(started, disks=disks if disk is None else (*disks, disk))

    _note(vm, changed)


def note_eject(vm: Vm) -> None:
    """A running machine has lost its CD."""
    _note(vm, lambda started: replace(started, iso=None))


def _note(vm: Vm, change: Callable[[VmSpec], VmSpec]) -> None:
    found = running(vm)
    if found is not None:
        text = write_spec(change(read_spec(vm.name, found.text)), found.text)
        _write_record(vm, replace(found, text=text))


def turn_over(log: Path) -> None:
    """Keep the log of the run before, and begin anew."""
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))
    log.touch(mode=0o600)


def _write_record(vm: Vm, record: Running) -> None:
    write_private(vm.running_file, (json.dumps(asdict(record), indent=1) + "\n").encode())


# ---- ending -------------------------------------------------------------------------------------


def press_power_button(vm: Vm) -> None:
    """Ask the guest to switch itself off (ACPI). Raises: StateError, HostError, PeerError."""
    with monitor(vm) as qmp:
        qmp.call("system_powerdown")


def wait_for_end(found: Running, timeout_s: float) -> bool:
    """Whether QEMU has ended within the time."""
    deadline = time.monotonic() + timeout_s
    while found.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def end_by_force(vm: Vm, found: Running) -> None:
    """End QEMU as if the plug were pulled. Raises: HostError, StateError when it stays."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for descriptor in _process(found):
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                raise HostError(
                    f"can't end QEMU of VM '{vm.name}', process {found.pid}", errno.EPERM,
                    hint=f"sudo kill {found.pid}",
                ) from error  # fmt: skip
        if wait_for_end(found, END_SECONDS):
            return
    raise StateError(f"process {found.pid}, QEMU of VM '{vm.name}', can't be ended")


def _process(found: Running) -> Iterator[int]:
    """A descriptor of the process, if it is still the one that we mean."""
    try:
        descriptor = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return
    try:
        if found.alive():
            yield descriptor
    finally:
        os.close(descriptor)
