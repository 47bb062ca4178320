"""A user's VMs in folders of their own, and the command line that makes them.

The commands run in this process; the target and QEMU are processes of their own, as they are
for a user. Whatever a test does, all of them end with the bay.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from drivebay.cli.main import main
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.store import Vms

# Many guests on few cores are too late for the kernel's test of its timer.
APPEND = "console=ttyS0 quiet no_timer_check"


class Done(NamedTuple):
    code: int
    out: str
    err: str


class VmBay:
    """The folders are named by the environment, which the fixture has set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str) -> Done:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        return Done(code, _text(out), _text(err))

    def ok(self, *words: str) -> str:
        done = self.run(*words)
        assert done.code == 0, (words, done.out, done.err)
        return done.out

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def refused(self, *words: str) -> str:
        done = self.run(*words)
        assert done.code == 1, (words, done.code, done.out, done.err)
        return done.err

    def vm(self, *words: str) -> str:
        return self.ok("vm", *words)

    def info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json("vm", "info", name)
        return found

    def pid(self, name: str) -> int:
        pid = self.info(name)["pid"]
        assert isinstance(pid, int), f"VM '{name}' is not running"
        return pid

    def vm_folder(self, name: str) -> Path:
        return Path(self.info(name)["folder"])

    def start_target(self) -> None:
        """On all cores, so that none is kept from guests, which are many or slow."""
        cores = len(os.sched_getaffinity(0))
        socket = self.folder / "run/drivebay/rpc.sock"
        done = self.program("target", "start", "-m", f"[0-{cores - 1}]", "-r", str(socket))
        assert done.returncode == 0, done.stderr

    def target_pid(self) -> int:
        return int(self.json("target", "status")["pid"])

    def program(
        self, *words: str, timeout_s: float = 120, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A command as a process of its own: one that runs ssh, or a terminal."""
        return subprocess.run(
            [sys.executable, "-m", "drivebay", *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ssh(self, name: str, command: str, timeout_s: float = 120) -> str:
        """Run a shell command in a guest, which has to succeed."""
        done = self.program("vm", "ssh", name, "--", command, timeout_s=timeout_s)
        assert done.returncode == 0, (name, command, done.stdout, done.stderr)
        return done.stdout

    def controllers(self) -> list[str]:
        shown = json.loads(self.ok("rpc", "vhost_get_controllers"))
        return [entry["ctrlr"] for entry in shown]

    def disks(self) -> list[str]:
        return self.ok("disk", "list", "-q").split()

    def end(self) -> None:
        """Nothing that a test has started stays."""
        for name in Vms().names():
            with contextlib.suppress(ProcessLookupError):
                info = self.run("vm", "info", name, "--json")
                if info.code == 0 and json.loads(info.out)["pid"] is not None:
                    os.kill(json.loads(info.out)["pid"], signal.SIGKILL)
        self.run("target", "stop", "--force")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


def tiny_kernel(folder: Path, image: GuestImage) -> list[str]:
    """The words that start the demo's guest: its init waits for commands on a second port."""
    kernel, initrd = folder / "kernel", folder / "initrd"
    if not initrd.exists():
        kernel.write_bytes(image.kernel.read_bytes())
        initrd.write_bytes(image.initrd())
    return ["--kernel", str(kernel), "--initrd", str(initrd), "--append", APPEND]
