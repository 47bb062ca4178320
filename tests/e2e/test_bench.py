"""The driver, the load generator and `drivebay bench` against qemu-storage-daemon."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drivebay.engines import vhost_user_workload
from drivebay.engines.vhost_user_client import RequestFailed, VhostUserBlk
from drivebay.engines.vhost_user_connection import TargetGone
from drivebay.engines.vhost_user_workload import LoadParams, Workload, run_load
from drivebay.errors import UsageError
from tests.fakes.command_line import DRIVEBAY
from tests.fakes.descriptors import held_fds

pytestmark = pytest.mark.needs_qemu

DISK_BYTES = 16 << 20
INTERRUPTED_AT_START = [  # `drivebay`, with a Ctrl-C before the start of the load's thread returns
    sys.executable,
    "-c",
    """
import signal, threading
from drivebay.cli.main import main

def start(thread, start=threading.Thread.start):
    start(thread)
    signal.raise_signal(signal.SIGINT)

threading.Thread.start = start
raise SystemExit(main())
""",
]


class Daemon:
    """One qemu-storage-daemon with one disk."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, image: Path) -> None:
        self.process = process
        self.socket = str(socket)
        self.image = image


@contextmanager
def storage_daemon(folder: Path, options: str = "writable=on") -> Iterator[Daemon]:
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is missing: install qemu-system-common"
    image, socket = folder / "disk.img", folder / "blk.sock"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    export = (
        f"type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={socket},"
        f"num-queues=4,logical-block-size=512,{options}"
    )
    command = [
        program,
        "--blockdev",
        f"driver=file,node-name=f0,filename={image},discard=unmap",
        "--export",
        export,
    ]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert process.poll() is None, "qemu-storage-daemon ended at once"
                assert time.monotonic() < deadline, "no socket after 30 s"
                time.sleep(0.02)
            yield Daemon(process, socket, image)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with storage_daemon(tmp_path_factory.mktemp("qsd")) as daemon:
        yield daemon


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DRIVEBAY, "bench", *arguments], text=True, capture_output=True, timeout=60
    )


# --- single requests


def test_what_is_written_lies_in_the_file_and_is_read_back(daemon: Daemon) -> None:
    data = random.Random(1).randbytes(3 << 20)
    with VhostUserBlk.connect(daemon.socket, queues=2) as disk:
        assert disk.capacity_bytes == DISK_BYTES
        assert disk.max_queues == 4
        disk.write(512 * 3, data)
        disk.flush()
        assert disk.read(512 * 3, len(data)) == data
    assert daemon.image.read_bytes()[512 * 3 : 512 * 3 + len(data)] == data


def test_zeroes_discard_and_the_name(daemon: Daemon) -> None:
    # The daemon punches holes in a real file, which a busy disk may take its time for.
    with VhostUserBlk.connect(daemon.socket, timeout_s=60) as disk:
        disk.write(0, b"\xa5" * 65536)
        disk.write_zeroes(0, 4096)
        assert disk.read(0, 8192) == bytes(4096) + b"\xa5" * 4096
        disk.discard(0, 65536)
        assert disk.get_id() == "vhost_user_blk"


def test_a_refused_request_says_which_and_why(daemon: Daemon) -> None:
    with VhostUserBlk.connect(daemon.socket) as disk:
        with pytest.raises(RequestFailed, match=f"IN at sector {DISK_BYTES // 512}") as caught:
            disk.read(DISK_BYTES, 512)
        assert caught.value.status == 1
        assert disk.request(99, 0, 0)[0] == 2
        with pytest.raises(UsageError, match="whole sectors"):
            disk.read(1, 512)
        assert len(disk.read(0, 512)) == 512


def test_the_write_cache_is_the_drivers_choice(daemon: Daemon) -> None:
    with VhostUserBlk.connect(daemon.socket) as disk:
        for enabled in (True, False):
            disk.set_write_cache(enabled)
            assert disk.write_cache is enabled


def test_sessions_leave_no_descriptor_behind(daemon: Daemon) -> None:
    before = held_fds()
    for _ in range(5):
        VhostUserBlk.connect(daemon.socket, queues=4).close()
    with pytest.raises(UsageError, match="5 queues"):
        VhostUserBlk.connect(daemon.socket, queues=5)
    assert held_fds() == before


# --- loads


@pytest.mark.parametrize("workload", list(Workload))
def test_each_workload_runs_and_verifies(daemon: Daemon, workload: Workload) -> None:
    if not workload.writes:
        run_load(LoadParams(daemon.socket, Workload.WRITE, runtime_s=0.1, verify=True))
        with VhostUserBlk.connect(daemon.socket) as disk:
            disk.flush()
        size = 32 * 4096  # certainly written by the load above
    else:
        size = DISK_BYTES
    result = run_load(
        LoadParams(
            daemon.socket, workload, runtime_s=0.3, verify=True, queues=2, depth=8, size=size
        )
    )
    assert result.first_mismatch is None
    assert not result.failed
    assert result.verified_blocks > 0
    assert bool(result.writes) is workload.writes
    assert result.reads + result.writes == result.latency_us.count
    assert result.queue_size == 128


def test_large_blocks_and_flushes(daemon: Daemon) -> None:
    result = run_load(
        LoadParams(
            daemon.socket,
            Workload.RANDWRITE,
            runtime_s=0.3,
            block_bytes=256 << 10,
            depth=4,
            fsync=4,
            verify=True,
        )
    )
    assert not result.failed
    assert result.flushes >= result.writes // 4 - 1
    assert set(result.by_kind_us) == {"write", "flush"}


def test_an_open_loop_keeps_its_rate(daemon: Daemon) -> None:
    result = run_load(LoadParams(daemon.socket, runtime_s=0.5, rate=500))
    assert 0 < result.reads <= 500 * result.seconds + 1


@pytest.mark.parametrize("rate", [None, 300.0])
def test_a_load_that_sleeps_until_it_is_called(daemon: Daemon, rate: float | None) -> None:
    result = run_load(
        LoadParams(daemon.socket, queues=2, depth=2, runtime_s=0.5, rate=rate, interrupts=True)
    )
    assert not result.failed
    # It looks ten times a second without a call, too: that would be 20 requests.
    assert result.reads > 25


def test_another_thread_ends_a_load_and_it_is_verified(daemon: Daemon) -> None:
    ended = threading.Event()
    ended.set()
    params = LoadParams(daemon.socket, Workload.RANDWRITE, runtime_s=3600, verify=True)
    result = run_load(params, ended)
    assert result.writes > 0
    assert result.verified_blocks > 0
    assert not result.interrupted


def test_a_target_that_keeps_no_requests_is_refused(daemon: Daemon) -> None:
    done = bench(daemon.socket, "--reconnect")
    assert done.returncode == 1
    assert "offers no INFLIGHT_SHMFD" in done.stderr
    assert "hint: run without --reconnect" in done.stderr


def test_a_write_behind_the_drivers_back_is_a_mismatch(daemon: Daemon) -> None:
    run_load(LoadParams(daemon.socket, Workload.WRITE, runtime_s=0.3, verify=True, size=1 << 20))
    with VhostUserBlk.connect(daemon.socket) as disk:
        block = bytearray(disk.read(8192, 4096))
        block[1000] ^= 4
        disk.write(8192, bytes(block))
    result = run_load(
        LoadParams(daemon.socket, Workload.READ, runtime_s=0.2, verify=True, size=1 << 20)
    )
    assert result.mismatched_blocks > 0
    assert result.first_mismatch is not None
    assert result.first_mismatch.startswith(f"offset {8192 + 1000} ")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"block_bytes": 1000}, "sectors of 512"),
        ({"depth": 0}, "depth 0"),
        ({"depth": 300}, "ring of 2048"),
        ({"queues": 5}, "serves 1 to 4"),
        ({"offset": DISK_BYTES}, "does not suit|0 blocks"),
        ({"size": DISK_BYTES + 512}, "does not suit"),
        ({"size": 2048}, "holds 0 blocks"),
        ({"size": 65536, "verify": True}, "16 blocks"),
        ({"core": 4096}, "core 4096"),
        ({"rate": 0.0}, "a rate of 0"),
        ({"runtime_s": 0.0}, "a runtime of 0"),
        ({"runtime_s": float("inf")}, "a runtime of inf"),
        ({"runtime_s": float("nan")}, "a runtime of nan"),
        ({"fsync": -1}, "fsync -1"),
        ({"offset": -512}, "offset -512"),
        ({"block_bytes": 32 << 20}, "at most 16 MiB"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(
    daemon: Daemon, params: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_load(LoadParams(daemon.socket, **params))  # type: ignore[arg-type]


def test_a_read_only_disk_is_not_written(tmp_path: Path) -> None:
    with storage_daemon(tmp_path, "writable=off") as daemon:
        with pytest.raises(UsageError, match="read-only"):
            run_load(LoadParams(daemon.socket, Workload.RANDWRITE))
        assert not run_load(LoadParams(daemon.socket, runtime_s=0.1)).failed


# --- a target that goes away


def start_load(daemon: Daemon, program: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, "bench", daemon.socket, "--runtime", "3600"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A runner started in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def running_load(daemon: Daemon) -> subprocess.Popen[str]:
    """`drivebay bench` for an hour, as soon as it has a session."""
    load = start_load(daemon, DRIVEBAY)
    deadline = time.monotonic() + 30
    while not is_loading(load.pid):
        assert load.poll() is None, load.communicate()
        assert time.monotonic() < deadline, "no load after 30 s"
        time.sleep(0.02)
    return load


def is_loading(pid: int) -> bool:
    """Has the process a second thread? That is the load's own."""
    return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1


def ended(load: subprocess.Popen[str], action: Callable[[], None]) -> tuple[int, str, str]:
    with load:
        try:
            action()
            out, err = load.communicate(timeout=30)
        finally:
            load.kill()
    return load.returncode, out, err


def test_a_killed_target_is_noticed(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as daemon:
        code, _, err = ended(running_load(daemon), daemon.process.kill)
    assert code == 3
    assert "the target closed" in err
    assert "requests outstanding" in err


def test_a_target_that_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user_workload, "STALL_S", 0.5)
    with storage_daemon(tmp_path) as daemon:
        with VhostUserBlk.connect(daemon.socket, timeout_s=0.5) as disk:
            daemon.process.send_signal(signal.SIGSTOP)
            with pytest.raises(TargetGone, match=r"within 0\.5 s"):
                disk.read(0, 512)
            daemon.process.send_signal(signal.SIGCONT)
        stopper = subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {daemon.process.pid}"])
        with stopper, pytest.raises(TargetGone, match="completed nothing for"):
            run_load(LoadParams(daemon.socket, depth=4, runtime_s=3600))


def test_ctrl_c_prints_what_was_measured(daemon: Daemon) -> None:
    load = running_load(daemon)
    code, out, err = ended(load, lambda: load.send_signal(signal.SIGINT))
    assert code == 130, err
    assert "(interrupted)" in out
    assert "IOPS" in out


def test_ctrl_c_while_the_load_starts_ends_it_too(daemon: Daemon) -> None:
    code, out, err = ended(start_load(daemon, INTERRUPTED_AT_START), lambda: None)
    assert code == 130, err
    assert "(interrupted)" in out


# --- the command


def test_the_result_as_json(daemon: Daemon) -> None:
    done = bench(daemon.socket, "--rw", "randrw", "--runtime", "0.2", "--json", "--bs", "8k")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["params"]["block_bytes"] == 8192
    assert result["params"]["workload"] == "randrw"
    assert result["write_cache"] is False
    assert "FLUSH" in result["features"]
    assert result["iops"] == pytest.approx((result["reads"] + result["writes"]) / result["seconds"])
    assert result["latency_us"]["p50"] <= result["latency_us"]["max"]


def test_the_result_as_text(daemon: Daemon) -> None:
    done = bench(daemon.socket, "--rw", "randwrite", "--runtime", "0.2", "--verify", "--rate", "1k")
    assert done.returncode == 0, done.stderr
    assert "write-through" in done.stdout
    assert "1,000 requests/s wanted" in done.stdout
    assert ", 0 wrong" in done.stdout


def test_exit_codes(daemon: Daemon, tmp_path: Path) -> None:
    absent = bench(str(tmp_path / "no.sock"))
    assert absent.returncode == 3
    assert "no.sock" in absent.stderr
    assert "hint:" in absent.stderr
    assert bench(daemon.socket, "--rate", "fast").returncode == 2
    assert bench(daemon.socket, "--depth", "0").returncode == 2
    assert bench(daemon.socket, "--rw", "trim").returncode == 2


def test_a_mismatch_is_an_error(daemon: Daemon) -> None:
    with VhostUserBlk.connect(daemon.socket) as disk:
        disk.write_zeroes(0, 1 << 20)
    done = bench(daemon.socket, "--rw", "read", "--verify", "--runtime", "0.1", "--size", "1M")
    assert done.returncode == 1
    assert "verified blocks are wrong, the first at offset " in done.stderr
