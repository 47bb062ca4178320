#!/usr/bin/env python3
"""Throughput and cost against the number of controllers: all idle but one, and all busy.

Each number of controllers has a target of its own, with null disks and a session on each;
they take turns, and those whose turn it is not are stopped. With two reactors the second
one shares its core with the load, unless there are more cores.

What an idle controller costs the busy one must not grow with their number.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
from chart import Panel, write_lines
from contenders import BLOCK_BYTES, Case, Sample, Served
from measuring import spread
from resting import idle_sessions, with_disks
from targets import DISK_BYTES, LOAD_CORE, Target, alone, drivebay, running

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_load import Load, tick_rate
from drivebay.engines.vhost_user_workload import GATHER_S
from drivebay.errors import DrivebayError

COUNTS = (1, 4, 16, 64, 256)
REACTORS = (1, 2)
ONE_BUSY = "one busy"
ALL_BUSY = "all busy"
DEPTH = 32


@dataclass
class Point:
    """One number of controllers on one number of reactors."""

    reactors: int
    controllers: int
    target: Target
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    idle_percent: list[float] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [f"null{number}" for number in range(self.controllers)]

    def iops(self, mode: str) -> float:
        return statistics.median(sample.iops for sample in self.samples[mode])

    def cost(self, mode: str, figure: str) -> float:
        return float(statistics.median(getattr(one, figure) for one in self.samples[mode]))

    def as_json(self) -> dict[str, Any]:
        return {
            "reactors": self.reactors,
            "controllers": self.controllers,
            "idle_percent": self.idle_percent,
            "modes": {
                mode: [
                    {k: v for k, v in vars(sample).items() if k in ("iops", "cpu_ns", "busy_ns")}
                    for sample in samples
                ]
                for mode, samples in self.samples.items()
            },
        }


def one_busy(point: Point, seconds: float) -> Sample:
    """Load on the first disk; the others have a session that rests."""
    with idle_sessions(point.target, point.names[1:]):
        return Served(point.target).run(Case("null0", "randread", DEPTH), seconds, None)


def all_busy(point: Point, seconds: float) -> Sample:
    """One thread that keeps requests in flight on all disks."""
    target = point.target
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                VhostUserBlk(str(target.sockets[name]), slots=DEPTH, slot_bytes=BLOCK_BYTES)
            )
            for name in point.names
        ]
        load = Load(
            [queue for session in sessions for queue in session.queues],
            first_sector=0,
            num_blocks=DISK_BYTES // BLOCK_BYTES,
            block_bytes=BLOCK_BYTES,
            random=True,
            read_share=65536,
            flush_every=0,
            verify=False,
            self_check=False,
            run=1,
        )
        cpu, busy = target.cpu_seconds(), target.busy_seconds() or 0.0
        _run_pinned(load, seconds)
        cpu, busy = target.cpu_seconds() - cpu, (target.busy_seconds() or 0.0) - busy
        counters = load.counters()
    if counters["errors"] or counters["broken_ring"] or not counters["reads"]:
        raise DrivebayError(f"the load on {point.controllers} controllers failed: {counters}")
    done = counters["reads"]
    elapsed = counters["elapsed_ticks"] / tick_rate()
    return Sample(done / elapsed, cpu_ns=cpu / done * 1e9, busy_ns=busy / done * 1e9)


def _run_pinned(load: Load, seconds: float) -> None:
    """Raises: DrivebayError when it does not come back."""

    def pinned() -> None:
        os.sched_setaffinity(0, {LOAD_CORE})  # of this thread only
        load.run(int(seconds * tick_rate()), 0.0, int(GATHER_S * tick_rate()))

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join(seconds + 30)
    if thread.is_alive():
        load.abandon()
        thread.join()
        raise DrivebayError("the target completes nothing any more")


def rest(point: Point, seconds: float) -> float:
    """Processor of a target whose sessions all rest, in percent of a core."""
    with idle_sessions(point.target, point.names):
        time.sleep(min(0.5, seconds))
        before = point.target.cpu_seconds()
        time.sleep(seconds)
        return 100 * (point.target.cpu_seconds() - before) / seconds


def measure(options: argparse.Namespace) -> list[Point]:
    """All points; in each repetition every one has its turn."""
    with tempfile.TemporaryDirectory(prefix="drivebay-scale-") as name, ExitStack() as stack:
        points = [
            Point(reactors, count, _target(Path(name), reactors, count, stack))
            for reactors in options.reactors
            for count in options.counts
        ]
        targets = [point.target for point in points]
        stack.enter_context(running(targets))
        for number in range(options.repeat):
            for point in points:
                with alone(point.target, targets):
                    point.idle_percent.append(rest(point, options.runtime))
                    for mode, run in ((ONE_BUSY, one_busy), (ALL_BUSY, all_busy)):
                        point.samples.setdefault(mode, []).append(run(point, options.runtime))
            print(f"repetition {number + 1} of {options.repeat} is done", flush=True)
    return points


def _target(folder: Path, reactors: int, count: int, stack: ExitStack) -> Target:
    target = drivebay(folder / f"{reactors}-{count}", cores=range(reactors))
    stack.callback(target.stop)
    names = [f"null{number}" for number in range(count)]
    with_disks(target, names).pause()
    return target


def table(points: Sequence[Point]) -> str:
    """Markdown: throughput in thousands, the target's time for each request (busy / all),
    processor with all idle in percent of a core.
    """
    lines = [
        "| reactors | disks | one busy, k/s | ns each | all busy, k/s | ns each | idle, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = [str(point.reactors), str(point.controllers)]
        for mode in (ONE_BUSY, ALL_BUSY):
            cells.append(spread([sample.iops for sample in point.samples[mode]]))
            costs = (point.cost(mode, figure) for figure in ("busy_ns", "cpu_ns"))
            cells.append(" / ".join(f"{value:,.0f}" for value in costs))
        cells.append(f"{statistics.median(point.idle_percent):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def flatness(points: Sequence[Point]) -> list[dict[str, float]]:
    """For each number of reactors: what the idle ones take from the busy one, in all and each."""
    found = []
    for reactors in dict.fromkeys(point.reactors for point in points):
        row = [point for point in points if point.reactors == reactors]
        few = min(row, key=lambda point: point.controllers)
        many = max(row, key=lambda point: point.controllers)
        added = max(many.controllers - few.controllers, 1)
        grown = many.cost(ONE_BUSY, "busy_ns") - few.cost(ONE_BUSY, "busy_ns")
        found.append(
            {
                "reactors": reactors,
                "speed_kept": many.iops(ONE_BUSY) / few.iops(ONE_BUSY),
                "ns_each_idle_controller": grown / added,
            }
        )
    return found


def panels(points: Sequence[Point]) -> list[Panel]:
    speed: Panel = Panel("thousand requests a second", {})
    cost: Panel = Panel("ns of work for each request", {})
    for point in points:
        for mode in (ONE_BUSY, ALL_BUSY):
            name = f"{mode}, {point.reactors} reactor{'s' if point.reactors > 1 else ''}"
            speed.add(name, point.controllers, point.iops(mode) / 1000)
            cost.add(name, point.controllers, point.cost(mode, "busy_ns"))
    return [speed, cost]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = report.parser_of(
        __doc__, runtime=1.0, repeat=5, quick="1 repetition of 0.2 s, up to 4 controllers"
    )
    add = parser.add_argument
    add("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of controllers")
    add("--reactors", nargs="+", type=int, default=list(REACTORS))
    add("--name", default="scale", help="of the result's files")
    options = report.parse(parser, words)
    if options.quick:
        options.counts = [count for count in options.counts if count <= 4]
    return options


def run(options: argparse.Namespace) -> None:
    report.need_two_cores()
    # A session has a handful of descriptors, and there are hundreds.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    points = measure(options)
    flat = flatness(points)
    print(f"\n{table(points)}\n")
    for one in flat:
        print(
            f"{one['reactors']} reactor(s): the busy disk keeps {100 * one['speed_kept']:.1f} % of "
            f"its speed; each idle one adds {one['ns_each_idle_controller']:.2f} ns to a request"
        )
    path = report.save(
        options.out,
        options.name,
        {
            "runtime_s": options.runtime,
            "repeat": options.repeat,
            "depth": DEPTH,
            "points": [point.as_json() for point in points],
            "flatness": flat,
        },
    )
    write_lines(path.with_suffix(".svg"), "controllers", panels(points))
    print(f"\nwritten: {path} and .svg")


if __name__ == "__main__":
    sys.exit(report.main(lambda: run(parse(sys.argv[1:]))))
