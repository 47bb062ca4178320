"""The command line as a user has it, and a target that it runs, with its refusals.

Context: tests. Everything is a process: words go in, printed text and an exit code
come out. Never imports drivebay.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRIVEBAY = [sys.executable, "-m", "drivebay"]
WAIT_S = 30.0

MALLOC: dict[str, Any] = {
    "method": "bdev_malloc_create",
    "params": {"name": "M0", "block_size": 512, "num_blocks": 8192},
}
CONTROLLER: dict[str, Any] = {
    "method": "vhost_create_blk_controller",
    "params": {"ctrlr": "vhost.0", "dev_name": "M0"},
}


def configuration(*calls: dict[str, Any]) -> str:
    return json.dumps({"subsystems": [{"subsystem": "bdev", "config": list(calls)}]})


class Vhost:
    """One `drivebay vhost` with its sockets in a folder."""

    def __init__(self, folder: Path, *options: str, **settings: Any) -> None:
        self.rpc_socket = folder / "rpc.sock"
        words = ["vhost", "-S", str(folder), "-r", str(self.rpc_socket), *options]
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*DRIVEBAY, *words], stderr=subprocess.PIPE, text=True, **settings
        )

    def wait_for_rpc(self) -> Vhost:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.errors()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.rpc_socket))
                return self
            time.sleep(0.01)
        raise AssertionError("the RPC socket did not open")

    def call(self, method: str, **params: Any) -> Any:
        done = self.rpc(method, *([json.dumps(params)] if params else []))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def rpc(self, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        return drivebay("rpc", "-s", str(self.rpc_socket), *words, **settings)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def vhost(folder: Path, *options: str, **settings: Any) -> Iterator[Vhost]:
    process = Vhost(folder, *options, **settings)
    try:
        yield process
    finally:
        process.close()


def drivebay(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DRIVEBAY, *words], capture_output=True, text=True, timeout=WAIT_S, **settings
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
