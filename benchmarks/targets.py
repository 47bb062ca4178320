"""Start the targets that are compared, each pinned to one core, and stop them again.

A target is a process and, per workload, a vhost-user socket. Ours and QEMU's storage
daemon are known; any other is described by the caller.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivebay.errors import DrivebayError, HostError
from drivebay.rpc.client import Client

TARGET_CORE = 0
DISK_BYTES = 64 << 20
DIRECT_BYTES = 512 << 20
START_LIMIT_S = 20.0


@dataclass
class Target:
    """One process under test."""

    name: str
    command: list[str]
    sockets: dict[str, Path]  # workload -> socket
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)
    client: Client | None = field(default=None)  # of ours, to ask how busy it is

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: os.sched_setaffinity(0, {TARGET_CORE}),
            )

    def wait_for_sockets(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not all(path.exists() for path in self.sockets.values()):
            if self.process is None or self.process.poll() is not None:
                raise DrivebayError(f"{self.name} ended at its start", hint=f"cat {self.log}")
            if time.monotonic() > deadline:
                raise DrivebayError(f"{self.name} made no sockets", hint=f"cat {self.log}")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """CPU time of all threads, the kernel's workers for its I/O included."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def busy_seconds(self) -> float:
        """What our reactors call work: polling in vain is not in it. Ours only."""
        assert self.client is not None
        found = self.client.call("framework_get_reactors")
        return float(sum(r["busy"] for r in found["reactors"]) / found["tick_rate"])

    def resident_bytes(self) -> int:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def drivebay(folder: Path, name: str = "drivebay") -> Target:
    """Our target without disks yet; its RPC socket is FOLDER/rpc.sock."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "drivebay", "vhost", "-S", str(folder)]
    command += ["-m", hex(1 << TARGET_CORE), "-r", str(folder / "rpc.sock")]
    return Target(name, command, {}, folder / "log")


def wait_for_rpc(folder: Path) -> Client:
    """The first connection that the target accepts."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            return Client(str(folder / "rpc.sock"))
        except HostError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def add_disk(client: Client, target: Target, workload: str, method: str, **params: Any) -> None:
    """A bdev, a controller on it, and the socket in the target's list."""
    client.call(method, {"name": workload, "block_size": 512, **params})
    controller = f"vhost.{workload}"
    client.call("vhost_create_blk_controller", {"ctrlr": controller, "dev_name": workload})
    target.sockets[workload] = target.log.parent / controller


def storage_daemon(folder: Path, files: dict[str, Path]) -> Target:
    """QEMU's storage daemon with one export a workload; its blocks are in ``files``."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = {"null": f"driver=null-co,node-name=null,size={DISK_BYTES},read-zeroes=off"}
    options = {
        "malloc": "",
        "file hot": ",aio=io_uring",
        "file direct": ",aio=io_uring,cache.direct=on",
    }
    for workload, path in files.items():
        node = workload.replace(" ", "-")
        nodes[workload] = f"driver=file,node-name={node},filename={path}{options[workload]}"
    command = ["qemu-storage-daemon"]
    sockets = {}
    for number, (workload, node) in enumerate(nodes.items()):
        sockets[workload] = folder / f"export.{number}"
        command += ["--blockdev", node, "--export"]
        export = f"type=vhost-user-blk,id=e{number},node-name={workload.replace(' ', '-')}"
        socket = f"addr.type=unix,addr.path={sockets[workload]}"
        command.append(f"{export},{socket},writable=on,num-queues=1")
    return Target("qemu-storage-daemon", command, sockets, folder / "log")


def parse_other(text: str, folder: Path) -> Target:
    """``NAME,WORKLOAD=SOCKET,…,command=COMMAND``: any other target (command comes last)."""
    head, _, command = text.partition(",command=")
    name, *pairs = head.split(",")
    if not command or not pairs or any("=" not in pair for pair in pairs):
        raise SystemExit(f"--target '{text}': write NAME,WORKLOAD=SOCKET,…,command=COMMAND")
    folder.mkdir(parents=True, exist_ok=True)
    sockets = {key: Path(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    return Target(name, shlex.split(command), sockets, folder / "log")


@contextmanager
def running(targets: list[Target]) -> Iterator[None]:
    """All of them up, and none left behind."""
    try:
        for target in targets:
            if target.process is None:
                target.start()
            target.wait_for_sockets()
        yield
    finally:
        for target in targets:
            target.stop()


def make_file(path: Path, size: int = DISK_BYTES) -> Path:
    """A file whose every block is written, so that no hole makes reads cheaper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(chunk)
        os.fsync(file.fileno())
    return path
