"""A controller moves to other cores while a guest uses it: over a fake data plane."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import UsageError
from drivebay.vhost.ring import Coalescing
from tests.fakes.dataplane import FakeBdev
from tests.fakes.memory import GuestMemory
from tests.unit.vhost_serving import Serving, negotiate, start_ring


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    with Serving(tmp_path, monkeypatch, FakeBdev(), cores=3) as running:
        yield running


def cores(serving: Serving) -> list[tuple[int, int]]:
    """Index and core of each running queue."""
    return [(q.index, q.channel.reactor.core) for q in serving.plane.queues if q.running]


def test_queues_stop_where_they_are_and_go_on_elsewhere_at_the_same_place(
    serving: Serving,
) -> None:
    with GuestMemory() as memory, serving.connect_to(serving.create(cpumask="0x1")) as front:
        negotiate(front)
        front.set_mem_table(memory)
        fds = [fd for index in range(3) for fd in start_ring(front, memory, index)]
        assert cores(serving) == [(0, 0), (1, 0), (2, 0)]
        for queue in serving.plane.queues:
            queue.stop_at = 100 + queue.index
        controller = serving.controllers.get("vhost.0")
        serving.run(serving.controllers.move(controller, 0x6))
        moved = sorted(cores(serving))
        assert [index for index, _core in moved] == [0, 1, 2]
        assert {core for _index, core in moved} == {1, 2}
        assert [q.terms["base"] for q in serving.plane.queues if q.running] == [100, 101, 102]
        assert all(q.enabled for q in serving.plane.queues if q.running)
        assert {channel.reactor.core for channel in serving.registry.channels} == {1, 2}
        assert serving.call(controller.describe)["cpumask"] == "0x6"
        assert front.get_vring_base(1) == 101
        for fd in fds:
            os.close(fd)


def test_queues_that_may_stay_are_left_alone(serving: Serving) -> None:
    with GuestMemory() as memory, serving.connect_to(serving.create(cpumask="0x1")) as front:
        negotiate(front)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        controller = serving.controllers.get("vhost.0")
        serving.run(serving.controllers.move(controller, 0xFF01))
        (queue,) = serving.plane.queues
        assert "stop" not in queue.calls
        assert controller.cpumask == 1, "cores without a reactor do not count"
        for fd in fds:
            os.close(fd)


def test_the_front_end_waits_until_the_queue_has_drained_and_moved(serving: Serving) -> None:
    with GuestMemory() as memory, serving.connect_to(serving.create(cpumask="0x1")) as front:
        negotiate(front)
        front.set_mem_table(memory)
        fds = start_ring(front, memory)
        serving.plane.hold.add("stop")
        controller = serving.controllers.get("vhost.0")
        moving = asyncio.run_coroutine_threadsafe(
            serving.controllers.move(controller, 0x2), serving.loop
        )
        serving.plane.wait_for(lambda plane: bool(plane.held))
        assert not moving.done()
        assert len(serving.plane.queues) == 1, "it starts elsewhere before it has drained"
        serving.call(serving.plane.release)
        moving.result(timeout=20)
        assert cores(serving) == [(0, 1)]
        assert front.get_vring_base(0) == 0
        for fd in fds:
            os.close(fd)


def test_a_mask_without_any_reactor_is_refused_and_nothing_moves(serving: Serving) -> None:
    controller = serving.create(cpumask="0x3")
    with pytest.raises(UsageError, match="no core with a reactor"):
        serving.run(serving.controllers.move(controller, 0x8))
    assert controller.cpumask == 3


def test_coalescing_reaches_running_queues_at_once_and_later_ones_at_their_start(
    serving: Serving,
) -> None:
    with GuestMemory() as memory, serving.connect_to(serving.create()) as front:
        negotiate(front)
        front.set_mem_table(memory)
        fds = [*start_ring(front, memory)]
        wanted = Coalescing(20, 50_000)
        serving.run(serving.controllers.set_coalescing("vhost.0", wanted))
        fds += start_ring(front, memory, 1)
        assert [queue.coalescing for queue in serving.plane.queues] == [(20, 50_000)] * 2
        described = serving.call(serving.controllers.get("vhost.0").describe)
        assert (described["delay_base_us"], described["iops_threshold"]) == (20, 50_000)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    ("delay_base_us", "iops_threshold", "field"),
    [(1, 99, "iops_threshold"), ((1 << 32) - 1, 60_000, "delay_base_us")],
)
def test_coalescing_out_of_its_limits_is_refused(
    serving: Serving, delay_base_us: int, iops_threshold: int, field: str
) -> None:
    serving.create()
    with pytest.raises(UsageError) as refused:
        serving.run(
            serving.controllers.set_coalescing("vhost.0", Coalescing(delay_base_us, iops_threshold))
        )
    assert refused.value.field == field


def test_coalescing_is_saved_only_while_it_is_on(serving: Serving) -> None:
    controller = serving.create()
    assert [method for method, _params in controller.save()] == ["vhost_create_blk_controller"]
    serving.run(serving.controllers.set_coalescing("vhost.0", Coalescing(10, 20_000)))
    assert controller.save()[1:] == [
        (
            "vhost_controller_set_coalescing",
            {"ctrlr": "vhost.0", "delay_base_us": 10, "iops_threshold": 20_000},
        )
    ]
