"""The real target as a process, held from outside: RPC, its log, what /proc says of it.

Context: tests. The RPC client is a few lines of its own, so that a fault of ours on one side
cannot hide one on the other. Never imports drivebay.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0


class RpcError(Exception):
    """The target answered with an error object."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: int = error["code"]


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll gently; an assertion error that says what never came."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience_s:g} s: {what}")
        time.sleep(0.01)


class TargetProcess:
    """`drivebay vhost` in a folder of its own, with its output in a file."""

    def __init__(self, folder: Path, *options: str, open_files: int | None = None) -> None:
        self.folder = folder
        self.rpc_path = folder / "rpc.sock"
        self.log_path = folder / "target.log"
        command = [sys.executable, "-m", "drivebay", "vhost", "-S", str(folder)]
        command += ["-r", str(self.rpc_path), "-m", "0x1", *options]
        if open_files is not None:
            command = ["prlimit", f"--nofile={open_files}:{open_files}", *command]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(self._answers, f"an RPC answer; log:\n{self.log()}")
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the target ended at once; log:\n{self.log()}")
        try:
            self.rpc("spdk_get_version")
        except OSError:
            return False
        return True

    @property
    def pid(self) -> int:
        return self.process.pid

    def rpc(self, method: str, **params: object) -> Any:
        """One call on a connection of its own."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params:
            request["params"] = params
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self.rpc_path))
            sock.sendall(json.dumps(request).encode())
            answer = _read_object(sock)
        if "error" in answer:
            raise RpcError(answer["error"])
        return answer["result"]

    def malloc(self, name: str, mebibytes: int = 8, block_size: int = 512) -> None:
        blocks = (mebibytes << 20) // block_size
        self.rpc("bdev_malloc_create", name=name, num_blocks=blocks, block_size=block_size)

    def controller(self, name: str, bdev: str, **more: object) -> Path:
        """Make a blk controller; returns its socket."""
        self.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=bdev, **more)
        return self.folder / name

    # ---- the log ---------------------------------------------------------------------

    def forget_examining(self, bdev: str) -> None:
        """Have its counters at zero: looking into a new bdev is reading it."""
        self.rpc("bdev_wait_for_examine")
        self.rpc("bdev_reset_iostat", name=bdev)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def mark(self) -> int:
        """Where the log ends now."""
        return len(self.log())

    def wait_for_line(self, pattern: str, mark: int) -> str:
        """The first line since mark that matches."""
        found: list[str] = []

        def look() -> bool:
            lines = self.log()[mark:].splitlines()
            found.extend(line for line in lines if re.search(pattern, line))
            return bool(found)

        wait_until(look, f"a line like '{pattern}' in the log")
        return found[0]

    # ---- what it holds -----------------------------------------------------------------

    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def guest_mappings(self) -> int:
        """Mappings of the fakes' memfds."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        return sum("/memfd:guest" in line for line in maps.splitlines())

    def holds(self) -> tuple[int, int]:
        return self.open_files(), self.guest_mappings()

    def expect_holds(self, before: tuple[int, int]) -> None:
        """Wait until it holds no more descriptors and mappings than before."""
        wait_until(
            lambda: self.holds() == before,
            f"(descriptors, guest mappings) {before}; now {self.holds()}: {self._descriptors()}",
        )

    def _descriptors(self) -> str:
        links = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                links.append(str(fd.readlink()))
            except FileNotFoundError:
                continue
        return ", ".join(sorted(links))

    def expect_alive(self) -> None:
        assert self.process.poll() is None, f"the target ended; log:\n{self.log()[-4000:]}"

    # ---- the end -------------------------------------------------------------------------

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _read_object(sock: socket.socket) -> dict[str, Any]:
    data = b""
    while True:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"the RPC connection ended after {data!r}")
        data += piece
        try:
            answer = json.loads(data)
        except ValueError:
            continue
        assert isinstance(answer, dict)
        return answer
