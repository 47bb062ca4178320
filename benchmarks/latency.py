#!/usr/bin/env python3
"""How long one request takes: median, p99 and p99.9 at depth 1, by target and by client.

A client that polls sees what the target takes; one that sleeps until the target calls is what
a guest mostly is, and pays for a wake-up on each side. Requests come one after the other
("at once"), or at fixed times with a pause between them, in which a target may fall asleep.
Ours runs with its own choice of polling, polling for ever, and never polling.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from contenders import Case, Contender, Sample, Served
from goals import OURS, Goal
from measuring import in_turns
from spdk_peer import spdk_vhost
from targets import (
    Target,
    disk_files,
    drivebay,
    running,
    storage_daemon,
    storage_daemon_nodes,
)

WORKLOADS = ("null", "malloc", "file hot")
RATES = (0, 5_000, 500)
ALWAYS = f"{OURS}, always polling"
NEVER = f"{OURS}, never polling"
POLLING = {OURS: (), ALWAYS: ("--poll-us", "-1"), NEVER: ("--poll-us", "0")}
TOLERANCE = 1.05  # medians of the same thing differ by so much
CLIENTS: dict[str, dict[str, Any]] = {"polling": {}, "sleeping": {"interrupts": True}}


@dataclass
class Line:
    """One target seen by one kind of client."""

    target: str
    client: str
    workload: str
    rw: str
    rate: int  # a second; 0: the next request when the last one is done
    samples: list[Sample]

    def figure(self, name: str) -> float:
        return float(statistics.median(getattr(sample, name) for sample in self.samples))

    def text(self) -> str:
        pause = f"{self.rate:,}/s" if self.rate else "at once"
        times = (self.figure(name) for name in ("p50_us", "p99_us", "p99_9_us"))
        cells = [self.workload, self.rw, pause, self.client, self.target]
        cells += [f"{time:.1f}" for time in times]
        cells.append(f"{self.figure('cpu_ns'):,.0f}")
        return f"| {' | '.join(cells)} |"

    def as_json(self) -> dict[str, Any]:
        kept = ("p50_us", "p99_us", "p99_9_us", "cpu_ns", "busy_ns", "iops")
        samples = [{k: v for k, v in vars(one).items() if k in kept} for one in self.samples]
        return {**vars(self), "samples": samples}


HEAD = (
    "| disk | | requests | client | target | p50, us | p99 | p99.9 | target's ns each |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def prepare(folder: Path, options: argparse.Namespace, stack: ExitStack) -> list[Target]:
    """Start everybody with the same disks; ended with the stack."""
    places = {"file hot": Path("/dev/shm")} if "file hot" in options.workloads else {}
    targets = [
        drivebay(folder / f"ours{number}", name, words)
        for number, (name, words) in enumerate(POLLING.items())
    ]
    if options.spdk is not None:
        targets.append(spdk_vhost(options.spdk, folder / "spdk", False))
    for number, target in enumerate(targets):
        stack.callback(target.stop)
        files = stack.enter_context(disk_files(places, f"latency{number}"))
        target.start()
        for workload in options.workloads:
            target.add_disk(workload, files.get(workload))
        target.pause()
    if shutil.which("qemu-storage-daemon"):
        memory = {key: Path("/dev/shm") for key in options.workloads if key != "null"}
        files = stack.enter_context(disk_files(memory, "latency-qemu"))
        nodes = storage_daemon_nodes(options.workloads, files)
        targets.append(storage_daemon(folder / "qsd", nodes))
    return targets


def measure(targets: Sequence[Target], options: argparse.Namespace) -> list[Line]:
    """All lines; targets and clients take turns in each repetition."""
    contenders: list[Contender] = [
        Served(target, dict(load), f"/{client}")
        for target in targets
        for client, load in CLIENTS.items()
    ]
    lines = []
    for workload in options.workloads:
        for rw in options.rw:
            for rate in options.rates:
                found = in_turns(
                    Case(workload, rw, 1),
                    contenders,
                    targets,
                    repeat=options.repeat,
                    seconds=options.runtime,
                    rate=rate or None,
                )
                for name, samples in found.items():
                    target, _, client = name.rpartition("/")
                    lines.append(Line(target, client, workload, rw, rate, samples))
                    print(lines[-1].text(), flush=True)
    return lines


def wake_ups(lines: Sequence[Line]) -> list[Goal]:
    """Our own choice of polling must cost no more than polling for ever and one wake-up.

    A wake-up is what never polling adds to polling for ever.
    """
    found = {(one.target, one.client, one.workload, one.rw, one.rate): one for one in lines}
    goals = []
    for line in lines:
        if line.target != OURS:
            continue
        rest = (line.client, line.workload, line.rw, line.rate)
        always, never = (found[name, *rest].figure("p50_us") for name in (ALWAYS, NEVER))
        pause = f"{line.rate:,}/s" if line.rate else "at once"
        text = f"{line.workload}, {line.rw}, {pause}, {line.client} client: p50, us"
        bound = round(TOLERANCE * max(always, never), 2)
        goals.append(Goal(text, bound, line.figure("p50_us"), at_least=False))
    return goals


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = report.parser_of(__doc__, runtime=2.0, repeat=5, quick="1 repetition of 0.2 s")
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--rw", nargs="+", choices=("randread", "randwrite"), default=["randread"])
    add("--rates", nargs="+", type=int, default=list(RATES), help="a second; 0: at once")
    add("--spdk", type=Path, metavar="PROGRAM", help="SPDK's vhost; needs free huge pages")
    add("--name", default="latency", help="of the result's file")
    return report.parse(parser, words)


def run(options: argparse.Namespace) -> None:
    report.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="drivebay-latency-") as name, ExitStack() as stack:
        targets = prepare(Path(name), options, stack)
        stack.enter_context(running(targets))
        print(HEAD)
        lines = measure(targets, options)
    goals = wake_ups(lines)
    print(f"\n{report.show_goals(goals)}")
    path = report.save(
        options.out,
        options.name,
        {
            "runtime_s": options.runtime,
            "repeat": options.repeat,
            "lines": [line.as_json() for line in lines],
            "goals": [goal.as_json() for goal in goals],
        },
    )
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(report.main(lambda: run(parse(sys.argv[1:]))))
