"""A target with a kept configuration, and the command line that talks to it.

The commands run in this process, the target is one of its own, and data goes through its
sockets as a guest's would (tests.fakes.driver).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drivebay.cli.main import main
from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess, wait_until

MIB = 1 << 20
SECTORS = MIB // 512


def pattern(seed: int, length: int = 4096) -> bytes:
    return bytes((seed * 7 + at * 31 + (at >> 8)) & 0xFF for at in range(length))


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Bay:
    """A target with a kept configuration, and the command line that talks to it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self._ended = False
        self.target = self._start()

    def _start(self) -> TargetProcess:
        return TargetProcess(self.folder, "-c", str(self.folder / "kept.json"), "--autosave")

    def restart(self, *, crash: bool = False) -> None:
        if crash:
            self.target.kill()
        else:
            assert self.target.stop() == 0
        self.target = self._start()

    def end(self) -> None:
        """It must have lived until now; harmless twice."""
        if not self._ended:
            self._ended = True
            try:
                self.target.expect_alive()
            finally:
                self.target.kill()

    def run(self, group: str, subcommand: str, *more: str) -> Done:
        code = main([group, subcommand, "-s", str(self.target.rpc_path), *more])
        out, err = self.capsys.readouterr()
        return Done(code, out, err)

    def ok(self, *words: str) -> str:
        done = self.run(*words)
        assert done.code == 0, done.err
        return done.out

    def refused(self, *words: str) -> str:
        done = self.run(*words)
        assert done.code == 1, (done.out, done.err)
        return done.err

    def info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("disk", "info", name, "--json"))
        return found

    def attach(self, bdev: str) -> Path:
        """A controller called vhost.NAME; gone again with `detach`."""
        return self.target.controller(f"vhost.{bdev.rpartition('/')[2]}", bdev)

    def detach(self, bdev: str) -> None:
        name = f"vhost.{bdev.rpartition('/')[2]}"

        def idle() -> bool:
            (shown,) = self.target.rpc("vhost_get_controllers", name=name)
            return not shown["sessions"]

        wait_until(idle, f"{name} without sessions")
        self.target.rpc("vhost_delete_controller", ctrlr=name)

    def write(self, bdev: str, sector: int, data: bytes) -> None:
        with Session(self.attach(bdev)) as session:
            session.disk.write(sector, data)
            session.disk.flush()
        self.detach(bdev)

    def read(self, bdev: str, sector: int, length: int) -> bytes:
        with Session(self.attach(bdev)) as session:
            data: bytes = session.disk.read(sector, length)
        self.detach(bdev)
        return data
