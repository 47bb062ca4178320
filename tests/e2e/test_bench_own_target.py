"""The load generator against our own target: what it verifies, and what it notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_client import RequestFailed, VhostUserBlk
from drivebay.engines.vhost_user_connection import TargetGone
from drivebay.engines.vhost_user_workload import LoadParams, Workload, run_load
from drivebay.errors import PeerError, UsageError
from tests.fakes.process import TargetProcess, wait_until

DISK_MIB = 8


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetProcess]:
    target = TargetProcess(tmp_path_factory.mktemp("own"))
    target.malloc("M0", DISK_MIB)
    target.malloc("M4k", DISK_MIB, block_size=4096)
    yield target
    assert target.stop() == 0


@pytest.fixture(scope="module")
def disk_socket(target: TargetProcess) -> str:
    return str(target.controller("vhost.0", "M0"))


@pytest.fixture(scope="module")
def file_socket(target: TargetProcess) -> str:
    image = target.folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    target.rpc("bdev_uring_create", name="F0", filename=str(image), block_size=512)
    return str(target.controller("vhost.file", "F0"))


@pytest.fixture(scope="module")
def packed_socket(target: TargetProcess) -> str:
    return str(target.controller("vhost.packed", "M0", packed_ring=True))


@pytest.mark.parametrize("disk", ["disk_socket", "file_socket", "packed_socket"])
@pytest.mark.parametrize("workload", [Workload.WRITE, Workload.RANDWRITE, Workload.RANDRW])
def test_what_was_written_is_read_back(
    request: pytest.FixtureRequest, disk: str, workload: Workload
) -> None:
    socket = request.getfixturevalue(disk)
    result = run_load(
        LoadParams(socket, workload, queues=3, depth=40, runtime_s=0.5, fsync=20, verify=True)
    )
    assert result.first_mismatch is None
    assert not result.errors
    assert result.verified_blocks > 0
    assert result.flushes > 0


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("interrupts", [True, False], ids=["sleeping", "polling"])
def test_a_packed_ring_serves_every_kind_of_driver(
    packed_socket: str, indirect: bool, interrupts: bool
) -> None:
    result = run_load(
        LoadParams(
            packed_socket,
            Workload.RANDRW,
            depth=256,
            runtime_s=0.3,
            verify=True,
            indirect=indirect,
            interrupts=interrupts,
        )
    )
    assert result.packed
    assert ("RING_INDIRECT_DESC" in result.features) is indirect
    assert not result.failed
    assert result.verified_blocks > 0


@pytest.mark.parametrize(("block_bytes", "depth"), [(512, 256), (12 << 10, 7), (1 << 20, 4)])
def test_blocks_of_any_size(disk_socket: str, block_bytes: int, depth: int) -> None:
    result = run_load(
        LoadParams(
            disk_socket,
            Workload.RANDRW,
            block_bytes=block_bytes,
            depth=depth,
            runtime_s=0.3,
            verify=True,
        )
    )
    assert not result.failed
    assert result.verified_blocks > 0


def test_sessions_side_by_side_verify_their_halves(disk_socket: str) -> None:
    results = []

    def load(offset: int) -> None:
        half = DISK_MIB << 19
        results.append(
            run_load(
                LoadParams(
                    disk_socket,
                    Workload.RANDRW,
                    offset=offset,
                    size=half,
                    runtime_s=0.5,
                    verify=True,
                )
            )
        )

    threads = [threading.Thread(target=load, args=(at << 19,)) for at in (0, DISK_MIB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(bool(one.verified_blocks), one.failed) for one in results] == [(True, False)] * 2


def test_every_kind_of_request(disk_socket: str) -> None:
    with VhostUserBlk.connect(disk_socket) as disk:
        assert disk.capacity_bytes == DISK_MIB << 20
        assert disk.get_id() == "M0"
        disk.write(4096, b"\xa5" * 8192)
        disk.flush()
        disk.write_zeroes(4096, 4096, unmap=True)
        assert disk.read(4096, 8192) == bytes(4096) + b"\xa5" * 4096
        disk.discard(0, 1 << 20)
        with pytest.raises(RequestFailed) as caught:
            disk.read(DISK_MIB << 20, 512)
        assert caught.value.status == 1


def test_a_polling_target_is_not_kicked(disk_socket: str) -> None:
    result = run_load(LoadParams(disk_socket, runtime_s=0.3))
    assert result.kicks < result.reads / 10


def test_a_load_that_sleeps_is_called(disk_socket: str) -> None:
    result = run_load(
        LoadParams(
            disk_socket, Workload.RANDRW, depth=2, runtime_s=0.5, interrupts=True, verify=True
        )
    )
    assert not result.failed
    # It looks ten times a second without a call, too: that would be 10 requests.
    assert result.reads + result.writes > 25


def test_an_idle_target_is_woken(disk_socket: str) -> None:
    result = run_load(LoadParams(disk_socket, depth=1, runtime_s=0.5, rate=50))
    assert result.reads > 0
    assert 0 < result.kicks <= result.reads


def test_a_block_smaller_than_the_disks_is_refused(target: TargetProcess) -> None:
    socket = str(target.controller("vhost.4k", "M4k"))
    with pytest.raises(UsageError, match="4096") as caught:
        run_load(LoadParams(socket, block_bytes=512))
    assert caught.value.hint == "use --bs 4096 or a multiple"
    assert not run_load(LoadParams(socket, Workload.RANDRW, runtime_s=0.2, verify=True)).failed


def test_a_read_only_controller(target: TargetProcess) -> None:
    target.malloc("M1")
    socket = str(target.controller("vhost.ro", "M1", readonly=True))
    with pytest.raises(UsageError, match="read-only"):
        run_load(LoadParams(socket, Workload.RANDRW))
    with VhostUserBlk.connect(socket) as disk, pytest.raises(RequestFailed):
        disk.write(0, bytes(512))


def test_a_controller_that_is_deleted_under_load_is_noticed(target: TargetProcess) -> None:
    target.malloc("M2")
    socket = str(target.controller("vhost.gone", "M2"))
    mark = target.mark()

    def delete() -> None:
        target.wait_for_line("'vhost.gones0' begins", mark)
        target.rpc("vhost_delete_controller", ctrlr="vhost.gone", force=True)

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        with pytest.raises(TargetGone, match="the target closed"):
            run_load(LoadParams(socket, runtime_s=3600))
    finally:
        thread.join()


def test_a_second_ctrl_c_gives_up_a_target_that_is_waited_for(target: TargetProcess) -> None:
    """What was measured is the answer, not that the target is gone; and at once."""
    image = target.folder / "away.img"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    target.rpc("bdev_aio_create", name="F1", filename=str(image), block_size=512)
    target.forget_examining("F1")
    socket = str(target.controller("vhost.away", "F1"))
    over = threading.Event()

    def reads() -> int:
        return int(target.rpc("bdev_get_iostat", names=["F1"])["bdevs"][0]["num_read_ops"])

    def interrupt() -> None:
        wait_until(lambda: reads() > 0, "requests")
        target.rpc("vhost_delete_controller", ctrlr="vhost.away", force=True)
        for _ in range(2):  # the client notices within a tenth of a second
            if not over.wait(0.5):
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        begun = time.monotonic()
        result = run_load(LoadParams(socket, runtime_s=30, reconnect_s=3600))
        assert time.monotonic() - begun < 25
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert result.interrupted
    assert result.reads > 0


def test_a_ring_that_the_target_gives_up_is_noticed(disk_socket: str) -> None:
    with VhostUserBlk.connect(disk_socket, timeout_s=5) as disk:
        assert len(disk.read(0, 512)) == 512
        # A guest's mistake: the header's descriptor leads to one that does not exist. The next
        # read has the same shape, so the driver does not format its chain anew.
        memory, layout = disk._memory, disk._layouts[0]
        assert memory is not None
        memory.map[layout.desc + 14 : layout.desc + 16] = b"\xff\xff"
        with pytest.raises(PeerError, match="gave up queue 0"):
            disk.read(0, 512)


def test_a_killed_target_is_noticed(tmp_path: Path) -> None:
    target = TargetProcess(tmp_path)
    try:
        target.malloc("M0")
        socket = str(target.controller("vhost.0", "M0"))
        with VhostUserBlk.connect(socket) as disk:
            target.kill()
            with pytest.raises(TargetGone):
                disk.read(0, 512)
    finally:
        target.kill()
