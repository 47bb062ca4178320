#!/usr/bin/env python3
"""How exactly a disk's limits hold, on a real clock, and how two machines share one limit.

A disk in memory is far quicker than each limit. What is let through in a measurement is
compared with what may be: at several depths and numbers of queues, for requests and for
bytes. Then two loads of different depth, each with a controller of its own, share a limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from contenders import BLOCK_BYTES
from goals import Goal
from targets import LOAD_CORE, Target, drivebay

from drivebay.bdev.limits import LIMITS as LIMIT_NAMES
from drivebay.engines.vhost_user_workload import LoadParams, Workload, run_load
from drivebay.errors import DrivebayError

MIB = 1 << 20
TOLERANCE = 0.02
# Deep enough for both, which sleep on one core, to have a request waiting at all times.
SHARING_DEPTHS = (16, 128)
# a name, what is set, what it lets through in requests of 4 KiB a second
LIMITS: tuple[tuple[str, dict[str, int], float], ...] = (
    ("1,000 requests/s", {"rw_ios_per_sec": 1_000}, 1_000),
    ("50,000 requests/s", {"rw_ios_per_sec": 50_000}, 50_000),
    ("100 MiB/s", {"rw_mbytes_per_sec": 100}, 100 * MIB / BLOCK_BYTES),
    ("40 MiB/s of reads", {"r_mbytes_per_sec": 40}, 40 * MIB / BLOCK_BYTES),
)
HEAD = "| limit | depth | queues | let through, of what may be (least to most) |\n|---|---|---|---|"


@dataclass
class Line:
    """What was let through, divided by the limit, in each repetition."""

    limit: str
    depth: int
    queues: int
    ratios: list[float]

    @property
    def off(self) -> float:
        """The median's distance from the limit, as a share of it."""
        return abs(statistics.median(self.ratios) - 1)

    def text(self) -> str:
        middle = statistics.median(self.ratios)
        spread = f"{middle:.4f} ({min(self.ratios):.4f} to {max(self.ratios):.4f})"
        return f"| {self.limit} | {self.depth} | {self.queues} | {spread} |"


def set_limit(target: Target, limits: dict[str, int]) -> None:
    """These and no others."""
    every = dict.fromkeys(LIMIT_NAMES, 0) | limits
    target.call("bdev_set_qos_limit", name="malloc", **every)


def load(target: Target, disk: str, depth: int, queues: int, seconds: float) -> float:
    """Requests a second that a client which sleeps gets."""
    params = LoadParams(
        str(target.sockets[disk]),
        Workload.RANDREAD,
        depth=depth,
        queues=queues,
        runtime_s=seconds,
        core=LOAD_CORE,
        interrupts=True,
    )
    result = run_load(params)
    if result.errors:
        raise DrivebayError(f"requests failed under a limit: {result.errors}")
    return result.iops


def measure(target: Target, options: argparse.Namespace) -> list[Line]:
    lines = []
    for name, limits, allowed in LIMITS:
        set_limit(target, limits)
        for depth in options.depths:
            for queues in options.queues:
                ratios = [
                    load(target, "malloc", depth, queues, options.runtime) / allowed
                    for _ in range(options.repeat)
                ]
                lines.append(Line(name, depth, queues, ratios))
                print(lines[-1].text(), flush=True)
    return lines


def share(target: Target, options: argparse.Namespace) -> list[list[float]]:
    """Requests a second of two loads at once, for each repetition."""
    _, limits, _ = LIMITS[1]
    set_limit(target, limits)
    found = []
    with ThreadPoolExecutor(len(SHARING_DEPTHS)) as pool:
        for _ in range(options.repeat):
            running_loads = [
                pool.submit(load, target, disk, depth, 1, options.runtime)
                for disk, depth in zip(target.sockets, SHARING_DEPTHS, strict=True)
            ]
            found.append([one.result() for one in running_loads])
    return found


def goals_of(lines: Sequence[Line], shares: Sequence[Sequence[float]]) -> list[Goal]:
    worst = {name: max(line.off for line in lines if line.limit == name) for name, _, _ in LIMITS}
    goals = [
        Goal(f"{name}: off by at most, percent", 100 * TOLERANCE, 100 * off, at_least=False)
        for name, off in worst.items()
    ]
    smaller = statistics.median(min(one) / max(one) for one in shares)
    text = "two machines, depths {} and {}: the smaller share by the larger".format(*SHARING_DEPTHS)
    return [*goals, Goal(text, 1 - 2 * TOLERANCE, smaller)]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = report.parser_of(__doc__, runtime=1.0, repeat=5, quick="1 repetition of 0.2 s")
    add = parser.add_argument
    add("--depths", nargs="+", type=int, default=[1, 32, 128])
    add("--queues", nargs="+", type=int, default=[1, 2])
    return report.parse(parser, words)


def prepare(folder: Path, stack: ExitStack) -> Target:
    """A target with one disk in memory and two controllers on it."""
    target = drivebay(folder)
    stack.callback(target.stop)
    target.start()
    target.add_disk("malloc")
    target.call("vhost_create_blk_controller", ctrlr="vhost.second", dev_name="malloc")
    target.sockets["second"] = folder / "vhost.second"
    return target


def run(options: argparse.Namespace) -> None:
    report.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="drivebay-limits-") as name, ExitStack() as stack:
        target = prepare(Path(name), stack)
        print(HEAD)
        lines = measure(target, options)
        shares = share(target, options)
    goals = goals_of(lines, shares)
    print(f"\n{report.show_goals(goals)}")
    found: dict[str, Any] = {
        "runtime_s": options.runtime,
        "lines": [vars(line) for line in lines],
        "shares": shares,
        "goals": [goal.as_json() for goal in goals],
    }
    print(f"\nwritten: {report.save(options.out, 'limits', found)}")


if __name__ == "__main__":
    sys.exit(report.main(lambda: run(parse(sys.argv[1:]))))
