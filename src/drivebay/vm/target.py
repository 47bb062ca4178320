"""A target of our own as a child process: started, asked over its RPC socket, and ended.

Context: any thread, one at a time. For the demo and for tests, which want a target that
lives exactly as long as their block; `drivebay target start` makes one that stays.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from drivebay.errors import DrivebayError, UsageError
from drivebay.rpc.client import Client, RpcError
from drivebay.system.processes import Child, start

__all__ = ["TargetProcess"]

START_SECONDS = 30.0


class TargetProcess:
    """`drivebay vhost` with its sockets in ``folder``; ended when the block is left."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.rpc_socket = folder / "rpc.sock"
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        return self._running().process.pid

    def __enter__(self) -> TargetProcess:
        core = min(os.sched_getaffinity(0))
        command = [sys.executable, "-m", "drivebay", "vhost", "-S", str(self.folder)]
        command += ["-m", hex(1 << core), "-r", str(self.rpc_socket)]
        self._child = start("target", command, self.log)
        try:
            self._wait_for_answer()
        except DrivebayError:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """End the target; return its exit code. Harmless twice."""
        return self._running().stop()

    def ended(self) -> bool:
        return self._running().ended()

    def call(self, method: str, **parameters: Any) -> Any:
        """Call one RPC method and return its result."""
        with Client(str(self.rpc_socket)) as client:
            try:
                return client.call(method, parameters)
            except RpcError as error:
                raise DrivebayError(
                    f"the target refused '{method}': {error.message} (code {error.code})",
                    hint=f"see {self.log}",
                ) from error

    def controller_socket(self, name: str) -> Path:
        """Return where a controller of that name listens."""
        return self.folder / name

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.call("spdk_get_version")
                return
            except DrivebayError as error:
                child = self._running()
                if child.ended() or time.monotonic() > deadline:
                    raise DrivebayError(
                        "the target did not start",
                        hint=f"it said: {child.last_words()}   (log: {self.log})",
                    ) from error
                time.sleep(0.02)

    def _running(self) -> Child:
        if self._child is None:
            raise UsageError("the target is not started: use it in a 'with' block")
        return self._child
