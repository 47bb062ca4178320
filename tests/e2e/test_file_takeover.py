"""A target that was killed may hold its files a little longer: the next one waits for that.

The kernel ends a dead process's requests in its own time, and the file's lock with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.bdev.base import Bdev
from drivebay.errors import InUse
from drivebay.rpc import methods_file
from tests.fakes.command_line import Vhost, configuration, names, vhost
from tests.fakes.process import wait_until

MIB = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The lock that a target takes, on a descriptor of ours."""
    fd = os.open(path, os.O_RDWR)
    lock = struct.pack("=hhIqqiI", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


class Lines:
    """What a process prints, line by line, read beside the test."""

    def __init__(self, process: Vhost) -> None:
        self.text = ""
        assert process.process.stderr is not None
        self._file = process.process.stderr
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._file:
            self.text += line

    def join(self) -> None:
        self._thread.join()


def test_sockets_open_only_when_the_file_is_free(folder: Path) -> None:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(MIB))
    config = folder / "c.json"
    config.write_text(
        configuration(
            {"method": "bdev_aio_create", "params": {"name": "F0", "filename": str(disk)}},
            {
                "method": "vhost_create_blk_controller",
                "params": {"ctrlr": "vhost.0", "dev_name": "F0"},
            },
        )
    )
    with locked(disk) as lock, vhost(folder, "-c", str(config)) as target:
        lines = Lines(target)
        try:
            wait_until(lambda: "waiting up to 30 s" in lines.text, "a line that it waits")
            assert f"(pid {os.getpid()})" in lines.text
            assert "vhost.0" not in names(folder)
            os.close(lock)
            target.wait_for_rpc()
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.connect(str(folder / "vhost.0"))
            assert target.end() == 0
        finally:
            target.process.kill()
            lines.join()


def test_a_client_hears_at_once_that_a_file_is_in_use(folder: Path) -> None:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(MIB))
    with locked(disk), vhost(folder) as target:
        target.wait_for_rpc()
        refused = target.rpc("bdev_aio_create", json.dumps({"name": "F0", "filename": str(disk)}))
        assert refused.returncode == 1
        assert f"(pid {os.getpid()})" in refused.stderr
        assert target.end() == 0
        assert "waiting" not in target.errors()


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    async def attempt() -> Bdev:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            monkeypatch.setattr(methods_file, "HOLDER_LIMIT_S", 0.0)
        raise InUse("'disk.img' is locked by another process")

    with pytest.raises(InUse, match="locked by another process"):
        asyncio.run(methods_file._wait_for_holder(attempt))
    assert attempts == 3
