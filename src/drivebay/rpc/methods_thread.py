"""Methods about reactors and threads.

In SPDK's words each controller is a thread of its own, and ``app_thread`` is the one that
answers here. A controller's queues may be spread over several reactors; its busy time is
what those spent on its queues.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from drivebay.errors import UsageError
from drivebay.reactor.clock import tick_rate
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from drivebay.rpc.schema import APP, RUNTIME, Integer, Param, Params, String, method
from drivebay.target.options import format_cpumask
from drivebay.vhost.controllers import APP_THREAD_ID
from drivebay.vhost.cpumask import parse_cpumask

if TYPE_CHECKING:
    from drivebay.bdev.base import Channel
    from drivebay.dataplane.blk_queue import QueueCounters
    from drivebay.target.target import Target
    from drivebay.vhost.blk_controller import BlkController

APP_THREAD: Final = "app_thread"


class Thread(NamedTuple):
    """One thread of SPDK's vocabulary."""

    name: str
    id: int
    cpumask: str
    cores: frozenset[int]  # whose reactors serve it
    busy: int
    elapsed: int
    controller: BlkController | None


def threads(target: Target) -> list[Thread]:
    """The app thread, and one for each controller, in the order in which they were made."""
    shown = [_app_thread(target)]
    for controller in target.controllers:
        elapsed = int((time.monotonic() - controller.made_at) * tick_rate())
        shown.append(
            Thread(
                name=controller.name,
                id=controller.thread_id,
                cpumask=f"{controller.cpumask:x}",
                cores=frozenset(reactor.core for reactor in controller.reactors),
                busy=controller.busy_ticks,
                elapsed=max(elapsed, controller.busy_ticks),
                controller=controller,
            )
        )
    return shown


def _app_thread(target: Target) -> Thread:
    """Control's own; SPDK's runs on the first core, and clients look for it there."""
    core = target.reactors[0].core
    rate = tick_rate()
    busy = time.thread_time_ns() * rate // 10**9
    elapsed = int((time.monotonic() - target.started_at) * rate)
    mask = format_cpumask([core]).removeprefix("0x")
    cores = frozenset({core})
    return Thread(APP_THREAD, APP_THREAD_ID, mask, cores, busy, max(busy, elapsed), None)


def thread_id(target: Target, channel: Channel) -> int:
    """The thread whose channel this is: a controller's, or the app thread."""
    for controller in target.controllers:
        if any(channel in session.rings.channels for session in controller.sessions):
            return controller.thread_id
    return APP_THREAD_ID


def _cpu_times(tid: int) -> tuple[int, int]:
    """User and system time of one of our threads in clock ticks (proc_pid_stat(5))."""
    try:
        line = Path(f"/proc/self/task/{tid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, 0
    fields = line.rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


@method("framework_get_reactors", RUNTIME)
async def framework_get_reactors(target: Target, params: Params) -> Any:
    """Show the reactors with their busy and idle time in ticks, and whom they may serve."""
    reactors = []
    shown = threads(target)
    for reactor in target.reactors:
        stats = reactor.stats()
        user, system = _cpu_times(stats.tid)
        reactors.append(
            {
                "lcore": stats.core,
                "numa_id": 0,
                "tid": stats.tid,
                "busy": stats.busy_ticks,
                "idle": stats.idle_ticks,
                "in_interrupt": stats.sleeping,
                "irq": 0,
                "sys": system,
                "usr": user,
                "lw_threads": [
                    {
                        "name": thread.name,
                        "id": thread.id,
                        "cpumask": thread.cpumask,
                        "elapsed": thread.elapsed,
                    }
                    for thread in shown
                    if stats.core in thread.cores
                ],
            }
        )
    return {"tick_rate": tick_rate(), "pid": os.getpid(), "reactors": reactors}


def _queues(thread: Thread) -> Iterator[tuple[str, QueueCounters]]:
    """The queues that serve a controller now, each with its name."""
    if thread.controller is not None:
        for session in thread.controller.sessions:
            for ring in session.rings:
                if ring.queue is not None:
                    yield f"{session.name}_queue_{ring.index}", ring.queue.counters()


@method("thread_get_stats", RUNTIME)
async def thread_get_stats(target: Target, params: Params) -> Any:
    """Show each thread; active pollers are queues that are polled, paused ones await a kick."""
    shown = []
    for thread in threads(target):
        armed = [counters.armed for _name, counters in _queues(thread)]
        shown.append(
            {
                "name": thread.name,
                "id": thread.id,
                "cpumask": thread.cpumask,
                "busy": thread.busy,
                "idle": thread.elapsed - thread.busy,
                "active_pollers_count": armed.count(False),
                "timed_pollers_count": 0,
                "paused_pollers_count": armed.count(True),
            }
        )
    return {"tick_rate": tick_rate(), "threads": shown}


@method("thread_get_pollers", RUNTIME)
async def thread_get_pollers(target: Target, params: Params) -> Any:
    """Show the queues of each controller: how often they were polled, and found work."""
    shown = []
    for thread in threads(target):
        pollers: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for number, (name, counters) in enumerate(_queues(thread), 1):
            pollers[counters.armed].append(
                {
                    "name": name,
                    "id": number,
                    "state": "paused" if counters.armed else "waiting",
                    "run_count": counters.polls,
                    "busy_count": counters.busy_polls,
                }
            )
        shown.append(
            {
                "name": thread.name,
                "id": thread.id,
                "active_pollers": pollers[False],
                "timed_pollers": [],
                "paused_pollers": pollers[True],
            }
        )
    return {"tick_rate": tick_rate(), "threads": shown}


@method("thread_get_io_channels", RUNTIME)
async def thread_get_io_channels(target: Target, params: Params) -> Any:
    """Show which bdevs each thread has open, and for how many of its sessions."""
    used: dict[int, Counter[str]] = {thread.id: Counter() for thread in threads(target)}
    for controller in target.controllers:
        for session in controller.sessions:
            for channel in session.rings.channels:
                used[controller.thread_id][channel.bdev.name] += 1
    for bdev in target.registry:
        for channel in target.registry.channels(bdev):
            if (owner := thread_id(target, channel)) == APP_THREAD_ID:
                used[owner][bdev.name] += 1
    shown = [
        {
            "name": thread.name,
            "io_channels": [
                {"name": f"bdev_{name}", "ref": count} for name, count in used[thread.id].items()
            ],
        }
        for thread in threads(target)
    ]
    return {"tick_rate": tick_rate(), "threads": shown}


@method(
    "thread_set_cpumask",
    RUNTIME,
    params=(
        Param("id", Integer(64), required=True, doc="a controller's, from thread_get_stats"),
        Param("cpumask", String(), required=True, doc="the cores whose reactors may serve it"),
    ),
    style=APP,
    changes=True,
)
async def thread_set_cpumask(target: Target, params: Params) -> Any:
    """Move a controller to other cores, while guests use it; answers when all queues have."""
    text = params["cpumask"]
    try:
        mask = parse_cpumask(text)
    except UsageError as error:
        data = {"field": "cpumask", "value": text[:80], "hint": str(error)}
        raise RpcError(INTERNAL_ERROR, f"Invalid cpumask {text[:80]}", data) from error
    found = next((thread for thread in threads(target) if thread.id == params["id"]), None)
    if found is None:
        raise RpcError(INVALID_PARAMS, f"Thread {params['id']} does not exist")
    if found.controller is None:
        if not any(mask >> core & 1 for core in found.cores):
            raise RpcError(
                INVALID_PARAMS,
                f"{APP_THREAD} is shown on core {min(found.cores)} and does not move",
                {"field": "cpumask", "value": text[:80], "hint": "move controllers"},
            )
        return True
    try:
        await target.controllers.move(found.controller, mask)
    except UsageError as error:
        raise RpcError(
            INVALID_PARAMS,
            f"No CPU is selected from reactor mask {text[:80]}",
            {"field": "cpumask", "value": text[:80], "hint": str(error)},
        ) from error
    return True
