"""One disk on several cores: many queues, and moving while a client verifies every block."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.engines.vhost_user_workload import LoadParams, Workload, run_load
from tests.fakes.front_end import FrontEnd, Protocol
from tests.fakes.process import RpcError, TargetProcess

DISK_MIB = 16
MOVES = 40


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetProcess]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert cores == [0, 1], "these tests need the cores 0 and 1"
    target = TargetProcess(tmp_path_factory.mktemp("cores"), "-m", "0x3")
    target.malloc("M0", DISK_MIB)
    image = target.folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    target.rpc("bdev_uring_create", name="F0", filename=str(image), block_size=512)
    yield target
    assert target.stop() == 0


def thread_of(target: TargetProcess, name: str) -> dict[str, object]:
    threads = target.rpc("thread_get_stats")["threads"]
    (found,) = [thread for thread in threads if thread["name"] == name]
    assert isinstance(found, dict)
    return found


def listed_on(target: TargetProcess, name: str) -> set[int]:
    return {
        reactor["lcore"]
        for reactor in target.rpc("framework_get_reactors")["reactors"]
        if name in [thread["name"] for thread in reactor["lw_threads"]]
    }


@pytest.mark.parametrize("disk", ["M0", "F0"])
def test_no_request_is_lost_while_queues_move_between_cores(
    target: TargetProcess, disk: str
) -> None:
    name = f"moving.{disk}"
    path = target.controller(name, disk)
    number = thread_of(target, name)["id"]
    ended = threading.Event()
    moves = []

    def move() -> None:
        for turn in range(MOVES):
            mask = ("0x1", "0x2", "0x3")[turn % 3]
            assert target.rpc("thread_set_cpumask", id=number, cpumask=mask) is True
            moves.append(mask)
            if ended.wait(0.02):
                return

    mover = threading.Thread(target=move)
    mover.start()
    try:
        result = run_load(
            LoadParams(
                str(path), Workload.RANDRW, queues=4, depth=32, runtime_s=1.5, fsync=50, verify=True
            )
        )
    finally:
        ended.set()
        mover.join()
    assert result.first_mismatch is None
    assert not result.errors
    assert result.verified_blocks > 0
    assert len(moves) > 5
    after = thread_of(target, name)
    busy = after["busy"]
    assert isinstance(busy, int)
    assert busy > 0
    assert after["cpumask"] == moves[-1].removeprefix("0x")
    assert listed_on(target, name) == {"0x1": {0}, "0x2": {1}, "0x3": {0, 1}}[moves[-1]]
    target.rpc("vhost_delete_controller", ctrlr=name, force=True)


def test_a_moved_controller_is_saved_where_it_is(target: TargetProcess) -> None:
    target.controller("saved", "M0")
    target.rpc("thread_set_cpumask", id=thread_of(target, "saved")["id"], cpumask="[1]")
    calls = target.rpc("framework_get_config", name="vhost_blk")
    assert [call["params"]["cpumask"] for call in calls] == ["2"]
    for mask in ("0x4", "nonsense", "0"):
        with pytest.raises(RpcError):
            target.rpc("thread_set_cpumask", id=thread_of(target, "saved")["id"], cpumask=mask)
    assert listed_on(target, "saved") == {1}
    target.rpc("vhost_delete_controller", ctrlr="saved")


def test_all_queues_that_are_announced_are_served_over_all_cores(target: TargetProcess) -> None:
    path = target.controller("wide", "M0")
    with FrontEnd(path) as front:
        front.get_features()
        front.get_protocol_features()
        front.set_protocol_features(1 << Protocol.MQ | 1 << Protocol.CONFIG)
        announced = front.get_queue_num()
        config = front.get_config(0, 60)
        assert int.from_bytes(config[34:36], "little") == announced == 256
    result = run_load(
        LoadParams(
            str(path), Workload.RANDRW, queues=announced, depth=8, runtime_s=1.0, verify=True
        )
    )
    assert result.first_mismatch is None
    assert not result.errors
    target.rpc("vhost_delete_controller", ctrlr="wide", force=True)


def test_two_controllers_begin_on_different_cores(target: TargetProcess, tmp_path: Path) -> None:
    """SPDK's rule: the reactors of the mask in turn."""
    names = ["turn.0", "turn.1"]
    for name in names:
        target.controller(name, "M0")
    first = []
    for name in names:
        with_io = target.folder / name
        before = {
            reactor["lcore"]: reactor["busy"]
            for reactor in target.rpc("framework_get_reactors")["reactors"]
        }
        run_load(LoadParams(str(with_io), Workload.READ, queues=1, depth=64, runtime_s=0.4))
        after = {
            reactor["lcore"]: reactor["busy"] - before[reactor["lcore"]]
            for reactor in target.rpc("framework_get_reactors")["reactors"]
        }
        first.append(max(after, key=lambda core: after[core]))
        target.rpc("vhost_delete_controller", ctrlr=name, force=True)
    assert sorted(first) == [0, 1]
