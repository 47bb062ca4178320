"""Methods about reactors. Each reactor is one thread of SPDK's vocabulary, pinned to its core."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivebay.reactor.clock import tick_rate
from drivebay.reactor.reactor import Reactor
from drivebay.rpc.schema import RUNTIME, Params, method
from drivebay.target.options import format_cpumask

if TYPE_CHECKING:
    from drivebay.target.target import Target


def thread_id(target: Target, reactor: Reactor) -> int:
    """The number of a reactor's thread in thread_get_stats and per-channel statistics."""
    return target.reactors.index(reactor) + 1


def thread_name(reactor: Reactor) -> str:
    return f"reactor_{reactor.core}"


def _mask(core: int) -> str:
    return format_cpumask([core]).removeprefix("0x")


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
    """Show the reactors with their busy and idle time in ticks."""
    reactors = []
    for reactor in target.reactors:
        stats = reactor.stats()
        user, system = _cpu_times(stats.tid)
        total = stats.busy_ticks + stats.idle_ticks
        thread = {
            "name": thread_name(reactor),
            "id": thread_id(target, reactor),
            "cpumask": _mask(stats.core),
            "elapsed": total,
        }
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
                "lw_threads": [thread],
            }
        )
    return {"tick_rate": tick_rate(), "pid": os.getpid(), "reactors": reactors}


@method("thread_get_stats", RUNTIME)
async def thread_get_stats(target: Target, params: Params) -> Any:
    """Show each reactor's thread; active pollers are polled queues, paused ones armed."""
    threads = []
    for reactor in target.reactors:
        stats = reactor.stats()
        threads.append(
            {
                "name": thread_name(reactor),
                "id": thread_id(target, reactor),
                "cpumask": _mask(stats.core),
                "busy": stats.busy_ticks,
                "idle": stats.idle_ticks,
                "active_pollers_count": stats.queues_hot,
                "timed_pollers_count": 0,
                "paused_pollers_count": stats.queues_armed,
            }
        )
    return {"tick_rate": tick_rate(), "threads": threads}
