"""The target is killed under load, again and again, and nothing is lost or repeated.

The client is the load generator: it keeps the inflight region, comes back, and verifies
every block that it reads, and at the end every block that it wrote. `make soak` does more
of the same.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_workload import LoadParams, LoadResult, Workload, run_load
from drivebay.errors import DrivebayError
from tests.fakes.process import TargetProcess, wait_until

SOAK = "DRIVEBAY_SOAK" in os.environ
KILLS = 100 if SOAK else 10
CYCLES = 10_000 if SOAK else 300
DISK_BYTES = 16 << 20
QUEUES = 2
# A leak of two pages in each of 300 sessions shows, or of 200 bytes in each of 10,000; a heap
# that finds its size, and the last log lines that the target keeps, do not.
GROWTH_BYTES = 2 << 20


class Service:
    """A target that comes back from its file with what it had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = self._start()

    def _start(self) -> TargetProcess:
        config = self.folder / "target.json"
        return TargetProcess(self.folder, "-c", str(config), "--autosave")

    def disk(self, name: str, **controller: object) -> str:
        """A file bdev and its controller; returns the socket."""
        image = self.folder / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        self.target.rpc("bdev_aio_create", name=name, filename=str(image), block_size=512)
        self.target.forget_examining(name)
        return str(self.target.controller(f"c-{name}", name, **controller))

    def kill_and_start(self) -> None:
        self.target.kill()
        self.target = self._start()

    def requests(self, name: str) -> int:
        """How many the present process has executed."""
        bdevs = self.target.rpc("bdev_get_iostat")["bdevs"]
        (counts,) = (one for one in bdevs if one["name"] == name)
        return int(counts["num_read_ops"] + counts["num_write_ops"])


@pytest.fixture
def service() -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        service = Service(Path(name))
        yield service
        assert service.target.stop() == 0


class Load:
    """A load in a thread of its own, until it is ended."""

    def __init__(self, params: LoadParams) -> None:
        self._ended = threading.Event()
        self._result: list[LoadResult | DrivebayError] = []
        self._thread = threading.Thread(target=self._run, args=(params,))
        self._thread.start()

    def _run(self, params: LoadParams) -> None:
        try:
            self._result.append(run_load(params, self._ended))
        except DrivebayError as error:
            self._result.append(error)

    def expect_running(self) -> None:
        assert self._thread.is_alive(), self._result

    def end(self) -> LoadResult:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        (result,) = self._result
        if isinstance(result, DrivebayError):
            raise result
        return result


def kill_many_times(service: Service, load: Load, name: str) -> None:
    """At any moment: while requests run, while they are taken up again, before a session."""
    rng = random.Random(1)
    for number in range(KILLS):
        load.expect_running()
        if number % 4 != 3:
            wait_until(lambda: service.requests(name) > 0, "requests after the restart")
        time.sleep(rng.uniform(0, 0.15))
        service.kill_and_start()
    wait_until(lambda: service.requests(name) > 0, "requests after the last restart")


@pytest.mark.parametrize("ring", ["split", "packed", "packed, direct"])
def test_no_request_is_lost_and_no_block_is_wrong(service: Service, ring: str) -> None:
    socket = service.disk("F0", packed_ring=ring != "split")
    load = Load(
        LoadParams(
            socket,
            Workload.RANDRW,
            queues=QUEUES,
            fsync=100,
            runtime_s=3600,
            verify=True,
            indirect=ring == "packed",
            reconnect_s=30,
        )
    )
    try:
        kill_many_times(service, load, "F0")
    finally:
        result = load.end()
    assert result.packed is (ring != "split")
    assert result.errors == {}
    assert result.first_mismatch is None
    assert result.verified_blocks > 0
    # A target that was killed before the client came was not missed.
    assert KILLS * 3 // 4 <= result.reconnects <= KILLS


def test_the_command_goes_on_and_says_how_often(service: Service) -> None:
    socket = service.disk("F0")
    words = ["bench", socket, "--rw", "randrw", "--verify", "--reconnect", "--runtime", "4"]
    with subprocess.Popen(
        [sys.executable, "-m", "drivebay", *words, "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: service.requests("F0") > 0, "requests")
        service.kill_and_start()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    result = json.loads(output)
    assert result["reconnects"] == 1
    assert result["mismatched_blocks"] == 0
    assert "INFLIGHT_SHMFD" in result["protocol_features"]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def holds(target: TargetProcess) -> tuple[int, int]:
    """Descriptors, and mappings of what front ends shared."""
    maps = Path(f"/proc/{target.pid}/maps").read_text()
    return target.open_files(), maps.count("/memfd:")


def test_sessions_that_come_and_go_leave_nothing_behind(service: Service) -> None:
    sockets = [service.disk("F0"), service.disk("F1", packed_ring=True)]

    def cycle(number: int) -> None:
        """Both rings, with and without a region; some close, some just vanish."""
        kept = bool(number & 2)
        disk = VhostUserBlk(sockets[number & 1], keep_inflight=kept, slot_bytes=4096, slots=2)
        disk.read(4096 * (number % 100), 4096)
        if number % 3:
            disk.close()
        else:
            disk.connection.close()
            disk.close()

    def many(count: int) -> None:
        for number in range(count):
            cycle(number)

    many(CYCLES // 5)  # until every part has been used, and the log lines that are kept are full
    target = service.target
    before = settled(target)
    memory = resident_bytes(target.pid)
    many(CYCLES)
    assert settled(target) == before
    grown = resident_bytes(target.pid) - memory
    assert grown < GROWTH_BYTES, f"{grown} bytes more after {CYCLES} sessions"


def settled(target: TargetProcess) -> tuple[int, int]:
    """What it holds when that stays the same: a session's end takes a moment."""
    seen, same = holds(target), 0
    while same < 5:
        time.sleep(0.1)
        target.expect_alive()
        now = holds(target)
        seen, same = now, same + 1 if now == seen else 0
    return seen
