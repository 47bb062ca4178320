"""Two filters on a fan-out on two files: verified I/O goes on while the files grow beneath it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_workload import LoadParams, LoadResult, Workload, run_load
from tests.fakes.process import TargetProcess, wait_until

MIB = 1 << 20
BASE_MIB = 8
STEPS = 6
STRIP_KB = 16
BLOCK_BYTES = 44 << 10  # over the borders of strips, which lie on different bases
KEY = "000102030405060708090a0b0c0d0e0f"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[TargetProcess]:
    target = TargetProcess(tmp_path)
    try:
        yield target
        assert target.stop() == 0, target.log()[-4000:]
        assert "ERROR" not in target.log()
    finally:
        target.kill()


def load(socket: Path, size: int, seconds: float) -> LoadResult:
    return run_load(
        LoadParams(
            str(socket),
            Workload.RANDRW,
            block_bytes=BLOCK_BYTES,
            depth=16,
            runtime_s=seconds,
            size=size // BLOCK_BYTES * BLOCK_BYTES,
            fsync=64,
            verify=True,
        )
    )


def loads_until(ended: threading.Event, socket: Path, size: int) -> list[LoadResult]:
    """One after the other, each read back and verified at its end."""
    found: list[LoadResult] = []
    while not found or not ended.is_set():
        found.append(load(socket, size, 0.5))
    return found


def grow(target: TargetProcess, files: list[Path], mebibytes: int) -> None:
    for number, file in enumerate(files):
        os.truncate(file, mebibytes * MIB)
        target.rpc("bdev_aio_rescan", name=f"A{number}")


def wait_for_size(watcher: VhostUserBlk, size: int) -> None:
    wait_until(lambda: watcher.config().capacity_sectors * 512 == size, f"a disk of {size} bytes")


def last_block(step: int) -> bytes:
    return b"end of step" + bytes([step]) * 4085


def test_a_resize_travels_through_filters_and_a_fan_out_under_verified_io(
    target: TargetProcess, tmp_path: Path
) -> None:
    files = [tmp_path / f"base{number}.img" for number in range(2)]
    for number, file in enumerate(files):
        file.touch(mode=0o600)
        os.truncate(file, BASE_MIB * MIB)
        target.rpc("bdev_aio_create", name=f"A{number}", filename=str(file), block_size=512)
    target.rpc(
        "bdev_raid_create",
        name="R0",
        raid_level="raid0",
        strip_size_kb=STRIP_KB,
        base_bdevs=["A0", "A1"],
    )
    target.rpc("accel_crypto_key_create", name="k", cipher="AES_XTS", key=KEY, key2=KEY[::-1])
    target.rpc("bdev_crypto_create", name="C0", base_bdev_name="R0", key_name="k")
    target.rpc("bdev_passthru_create", name="P0", base_bdev_name="C0")
    socket = target.controller("c0", "P0")
    before = 2 * BASE_MIB * MIB
    ended = threading.Event()
    with ExitStack() as stack:
        watcher = stack.enter_context(VhostUserBlk(str(socket)))
        assert watcher.capacity_bytes == before
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(ended.set)  # also when something here fails
        running = pool.submit(loads_until, ended, socket, before)
        for step in range(1, STEPS + 1):
            grow(target, files, BASE_MIB + step)
            wait_for_size(watcher, 2 * (BASE_MIB + step) * MIB)
            watcher.write(watcher.capacity_bytes - 4096, last_block(step))
        ended.set()
        loads = running.result()
        for step in range(1, STEPS + 1):
            assert watcher.read(2 * (BASE_MIB + step) * MIB - 4096, 4096) == last_block(step)
    loads.append(load(socket, 2 * (BASE_MIB + STEPS) * MIB, 0.5))
    for found in loads:
        assert not found.errors
        assert min(found.reads, found.writes, found.flushes) > 0
