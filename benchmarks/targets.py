"""The processes that are compared: started on their core, held still while others run, ended.

A target is a process and, for each workload, a vhost-user socket. Each gets its own copies
of the files. A target that polls takes its whole core even when nobody asks it anything,
so all but the one that is measured are stopped (SIGSTOP) meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivebay.errors import DrivebayError, HostError
from drivebay.rpc.client import Client

TARGET_CORE = 0
LOAD_CORE = 1
WORKLOADS = ("null", "malloc", "file hot", "file direct")
PACKED = " packed"  # ends the name of a disk whose controller offers packed rings
DISK_BYTES = 64 << 20
DIRECT_BYTES = 512 << 20
START_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0
_LOOK_EVERY_S = 0.002

_METHODS = {
    "null": "bdev_null_create",
    "malloc": "bdev_malloc_create",
    "file hot": "bdev_uring_create",
    "file direct": "bdev_uring_create",
}
_UCRED = struct.Struct("iII")


@dataclass
class Target:
    """One process under test; without a command it is somebody else's."""

    name: str
    command: list[str]
    log: Path
    sockets: dict[str, Path] = field(default_factory=dict)  # workload -> socket
    rpc: Path | None = None  # a JSON-RPC socket with SPDK's methods, if it has one
    cores: frozenset[int] = frozenset({TARGET_CORE})
    client: Client | None = None
    first_answer_s: float | None = None
    _process: subprocess.Popen[bytes] | None = None
    _paused: bool = False

    def start(self) -> None:
        """Start it, and wait until its RPC answers if it has one. Raises: DrivebayError."""
        if not self.command:
            return
        began = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, self.cores),
            )
        while self.rpc is not None and self.client is None:
            self._check_alive(began)
            with contextlib.suppress(HostError):
                client = Client(str(self.rpc))
                client.call("spdk_get_version")
                self.client = client
                self.first_answer_s = time.monotonic() - began

    def wait_for_sockets(self) -> None:
        began = time.monotonic()
        while not all(path.exists() for path in self.sockets.values()):
            self._check_alive(began)

    def _check_alive(self, began: float) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise DrivebayError(f"{self.name} ended at its start", hint=f"its log: {self.tail()}")
        if time.monotonic() - began > START_LIMIT_S:
            raise DrivebayError(f"{self.name} did not come up", hint=f"its log: {self.tail()}")
        time.sleep(_LOOK_EVERY_S)

    def tail(self) -> str:
        """The end of its log; the folder is gone when somebody wants to read it."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else "none"

    def call(self, method: str, **params: Any) -> Any:
        assert self.client is not None, f"{self.name} has no RPC socket"
        return self.client.call(method, params)

    @property
    def pid(self) -> int:
        if self._process is not None:
            return self._process.pid
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(next(iter(self.sockets.values()))))
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid: int = _UCRED.unpack(found)[0]
        return pid

    def cpu_seconds(self) -> float:
        """Processor time of all threads; the kernel's io_uring workers are among them."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def busy_seconds(self) -> float | None:
        """What its reactors call work: polling in vain is not in it. None: it does not say."""
        if self.client is None:
            return None
        found = self.call("framework_get_reactors")
        return float(sum(r["busy"] for r in found["reactors"]) / found["tick_rate"])

    def resident_bytes(self) -> int:
        """Memory that it holds, huge pages included."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        sizes = {"VmRSS", "HugetlbPages"}
        lines = (line.partition(":") for line in status.splitlines())
        return sum(int(value.split()[0]) << 10 for name, _, value in lines if name in sizes)

    def pause(self) -> None:
        if self._process is not None and not self._paused:
            self._process.send_signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        if self._process is not None and self._paused:
            self._process.send_signal(signal.SIGCONT)
            self._paused = False

    def stop(self) -> None:
        if self._process is None:
            return
        self.resume()
        if self.client is not None:
            self.client.close()
            self.client = None
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def add_disk(self, workload: str, file: Path | None = None) -> None:
        """A bdev and a controller on it, by SPDK's methods; '… packed' has a packed ring."""
        name = workload.replace(" ", "-")
        kind = next((known for known in _METHODS if workload.startswith(known)), "null")
        params: dict[str, Any] = {"name": name, "block_size": 512}
        if file is None:
            params["num_blocks"] = DISK_BYTES // 512
        else:
            params["filename"] = str(file)
        self.call(_METHODS[kind], **params)
        controller: dict[str, Any] = {"ctrlr": f"vhost.{name}", "dev_name": name}
        if workload.endswith(PACKED):
            controller["packed_ring"] = True
        self.call("vhost_create_blk_controller", **controller)
        self.sockets[workload] = self.log.parent / f"vhost.{name}"


def drivebay(
    folder: Path,
    name: str = "drivebay",
    options: Sequence[str] = (),
    cores: Sequence[int] = (TARGET_CORE,),
) -> Target:
    """Our target, without disks."""
    rpc = folder / "rpc.sock"
    command = [sys.executable, "-P", "-m", "drivebay", "vhost", "-S", str(folder)]
    command += ["-m", hex(sum(1 << core for core in cores)), "-r", str(rpc), *options]
    return Target(name, command, folder / "log", rpc=rpc, cores=frozenset(cores))


def storage_daemon(folder: Path, nodes: dict[str, str]) -> Target:
    """QEMU's storage daemon with one export a workload; a node is a --blockdev."""
    command = ["qemu-storage-daemon"]
    sockets = {}
    for number, (workload, node) in enumerate(nodes.items()):
        sockets[workload] = folder / f"export.{number}"
        command += ["--blockdev", f"{node},node-name=n{number}", "--export"]
        address = f"addr.type=unix,addr.path={sockets[workload]}"
        export = f"type=vhost-user-blk,id=e{number},node-name=n{number},{address}"
        command.append(f"{export},writable=on,num-queues=1")
    return Target("qemu-storage-daemon", command, folder / "log", sockets)


def storage_daemon_nodes(workloads: Sequence[str], files: dict[str, Path]) -> dict[str, str]:
    """What the storage daemon serves in place of each workload; it has no disk in memory."""
    options = {"malloc": "", "file hot": "", "file direct": ",cache.direct=on"}
    found = {}
    for workload in workloads:
        if workload in files:
            plain = f"driver=file,aio=io_uring,filename={files[workload]}"
            found[workload] = plain + options[workload]
        else:
            found[workload] = f"driver=null-co,size={DISK_BYTES},read-zeroes=off"
    return found


def parse_peer(text: str, folder: Path) -> Target:
    """``NAME,WORKLOAD=SOCKET,…[,command=COMMAND]``: any other target (the command comes last)."""
    head, _, command = text.partition(",command=")
    name, *pairs = head.split(",")
    sockets = {key: Path(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    unknown = set(sockets) - set(WORKLOADS)
    if not sockets or unknown:
        raise SystemExit(
            f"--peer '{text}': write NAME,WORKLOAD=SOCKET,…[,command=COMMAND]; "
            f"the workloads are: {', '.join(WORKLOADS)}"
        )
    return Target(name, shlex.split(command), folder / "log", sockets)


@contextlib.contextmanager
def running(targets: Sequence[Target]) -> Iterator[None]:
    """Their sockets are there; none is left behind, also of those that started before."""
    try:
        for target in targets:
            if target._process is None:
                target.start()
            target.wait_for_sockets()
            target.pause()
        yield
    finally:
        stop_all(targets)


def stop_all(targets: Sequence[Target]) -> None:
    for target in targets:
        target.stop()


@contextlib.contextmanager
def alone(target: Target | None, targets: Sequence[Target]) -> Iterator[None]:
    """Only this one runs, or none."""
    for other in targets:
        if other is not target:
            other.pause()
    if target is not None:
        target.resume()
    yield


@contextlib.contextmanager
def disk_files(folders: dict[str, Path], owner: str) -> Iterator[dict[str, Path]]:
    """One target's files by workload, every block written so that no hole makes reads cheaper."""
    found = {}
    try:
        for workload, folder in folders.items():
            size = DIRECT_BYTES if workload == "file direct" else DISK_BYTES
            kind = workload.replace(" ", "-")
            path = folder / f"drivebay-bench-{os.getpid()}-{owner}-{kind}"
            found[workload] = path
            _fill(path, size)
        yield found
    finally:
        for path in found.values():
            path.unlink(missing_ok=True)


def _fill(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(chunk)
        os.fsync(file.fileno())
