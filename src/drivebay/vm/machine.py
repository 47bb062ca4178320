"""One running guest: QEMU as a child process, the guest's commands, and its end.

Context: any thread, one at a time. Used as a context manager: however the block is left,
QEMU has ended and its folder is gone afterwards; the logs stay.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from drivebay.errors import DrivebayError, HostError, PeerError, UsageError
from drivebay.system.processes import Child, start, unprivileged
from drivebay.vm.command import command_line
from drivebay.vm.guest_agent import GuestAgent, GuestOutput, GuestSilent
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.hardware import Disk, Hardware, Listener, Memory, Start
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu, Version
from drivebay.vm.qmp import Qmp

__all__ = ["BOOT_SECONDS", "Machine", "MachineSpec"]

BOOT_SECONDS = 120.0
COMMAND_SECONDS = 60.0
START_SECONDS = 30.0
APPEND = "console=ttyS0 quiet panic=-1"
POWER_OFF_SECONDS = 30.0

TRACKS_WRITES_OF_TCG: Version = (9, 0)

Connected = TypeVar("Connected", GuestAgent, Qmp)


@dataclass(frozen=True)
class MachineSpec:
    """What the caller wants; everything else is the same for each machine."""

    disks: Sequence[Disk]
    cpus: int = 2
    memory_mib: int = 256
    awaits_migration: bool = False  # it runs nothing until another machine is moved into it


class Machine:
    """A guest from its start to its end; ``folder`` is made for it and removed with it.

    Started by root, QEMU runs as an unprivileged user, which then needs to reach
    ``folder`` and owns the sockets of the disks.
    """

    def __init__(
        self,
        qemu: Qemu,
        accelerator: Accelerator,
        image: GuestImage,
        spec: MachineSpec,
        folder: Path,
        logs: Path,
        scripts: dict[str, bytes] | None = None,
    ) -> None:
        self.console_log = logs / f"{folder.name}-console.log"
        self.qemu_log = logs / f"{folder.name}-qemu.log"
        self.console_socket = folder / "console.sock"
        self._command_socket = folder / "commands.sock"
        self._qemu, self._accelerator, self._spec = qemu, accelerator, spec
        self._image, self._scripts, self._folder = image, scripts, folder
        self._child: Child | None = None
        self._agent: GuestAgent | None = None

    def __enter__(self) -> Machine:
        self._folder.mkdir(mode=0o700)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._start()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU at once and remove the folder; harmless twice."""
        if self._agent is not None:
            self._agent.close()
        if self._child is not None:
            self._child.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait_ready(self, timeout_s: float = BOOT_SECONDS) -> float:
        """Wait for the guest's init, after the start or a reboot; return its uptime."""
        try:
            return self._agent_now().wait_ready(timeout_s)
        except DrivebayError as error:
            error.hint = self._where_to_look()
            raise

    def run(self, script: str, timeout_s: float = COMMAND_SECONDS) -> GuestOutput:
        """Run a shell script in the guest."""
        try:
            return self._agent_now().run(script, timeout_s)
        except DrivebayError as error:
            error.hint = self._where_to_look()
            raise

    def reboot(self, timeout_s: float = BOOT_SECONDS) -> float:
        """Restart the guest; the same QEMU process resets the machine. Returns its uptime."""
        self._agent_now().send("busybox reboot -f")
        return self.wait_ready(timeout_s)

    def power_off(self, timeout_s: float = POWER_OFF_SECONDS) -> None:
        """Let the guest switch itself off, and wait for QEMU's end."""
        self._agent_now().send("busybox poweroff -f")
        self.wait_end(timeout_s)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until the guest has switched itself off; its exit code must be 0."""
        assert self._child is not None, "the machine was never started"
        deadline = time.monotonic() + timeout_s
        while not self._child.ended():
            if time.monotonic() > deadline:
                raise GuestSilent(
                    f"the guest did not switch off within {timeout_s:g} s",
                    hint=self._where_to_look(),
                )
            time.sleep(0.05)
        if self._child.process.returncode != 0:
            raise PeerError(
                f"QEMU ended with code {self._child.process.returncode}",
                hint=self._where_to_look(),
            )

    def ended(self) -> bool:
        return self._child is None or self._child.ended()

    def _start(self) -> None:
        kernel, initrd = self._folder / "kernel", self._folder / "initrd"
        shutil.copyfile(self._image.kernel, kernel)
        initrd.write_bytes(self._image.initrd(self._scripts))
        device = Path("/dev/kvm") if self._accelerator.name == "kvm" else None
        identity = unprivileged(device)
        if identity is not None:
            identity.take(self._folder)
            for path in (kernel, initrd, *(disk.socket for disk in self._spec.disks)):
                identity.take(path)
        with self.console_log.open("ab") as console:
            hardware = self._hardware(Start(str(kernel), str(initrd), APPEND), console.fileno())
            line = command_line(self._qemu, self._accelerator, hardware)
            self._child = start(
                "qemu", line, self.qemu_log, pass_fds=(console.fileno(),), identity=identity
            )
        self._agent = self._when_there(lambda: GuestAgent(self._command_socket))

    def _hardware(self, start: Start, console_log: int) -> Hardware:
        """QEMU writes a copy of all that the guest prints to the descriptor ``console_log``."""
        console = Listener(self.console_socket, log="/dev/fdset/1")
        return Hardware(
            name=self._folder.name,
            memory=Memory(_memory_kib(self._qemu, self._accelerator, self._spec.memory_mib)),
            monitor=Listener(self._folder / "monitor.sock"),
            serials=[("console", console), ("commands", Listener(self._command_socket))],
            cpus=self._spec.cpus,
            disks=[
                replace(disk, name=disk.name or f"vd{number}")
                for number, disk in enumerate(self._spec.disks)
            ],
            start=start,
            awaits_migration=self._spec.awaits_migration,
            files=[(console_log, 1)],
        )

    def monitor(self) -> Qmp:
        """Connect to QEMU's monitor; the caller closes it, before the next call."""
        return self._when_there(lambda: Qmp(self._folder / "monitor.sock"))

    def _when_there(self, connect: Callable[[], Connected]) -> Connected:
        """QEMU makes its sockets some time after its start, or ends with a message instead."""
        assert self._child is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return connect()
            except OSError as error:
                if self._child.ended() or time.monotonic() > deadline:
                    raise HostError(
                        "QEMU did not start", error.errno or errno.EIO, hint=self._where_to_look()
                    ) from error
                time.sleep(0.02)

    def _agent_now(self) -> GuestAgent:
        if self._agent is None:
            raise UsageError("the machine is not started: use it in a 'with' block")
        return self._agent

    def _where_to_look(self) -> str:
        """What QEMU said last, or where the guest's own messages are."""
        words = self._child.last_words() if self._child is not None else "nothing"
        if words == "nothing":
            return f"see the guest's console in {self.console_log}"
        return f"QEMU said: {words}   (log: {self.qemu_log})"


def _memory_kib(qemu: Qemu, accelerator: Accelerator, mib: int) -> int:
    """While a guest moves, emulation in QEMU before 9.0 forgets writes to memory whose size is
    a multiple of 64 pages: the guest arrives broken. A little more memory is without that fault.
    """
    forgets = accelerator.name == "tcg" and qemu.version < TRACKS_WRITES_OF_TCG
    return mib * 1024 + 8 if forgets else mib * 1024
