#!/usr/bin/env python3
"""Compare vhost-user-blk targets side by side: throughput, cost, idle, start, memory.

Each target runs on core 0, the load on core 1; within a repetition the targets take turns,
and those whose turn it is not are stopped. Beside QEMU's storage daemon, the bare copy loop
and fio (if it is installed), SPDK is measured where its programs are named:

    vhost_blk.py --spdk PATH/vhost --bdevperf PATH/bdevperf
    vhost_blk.py --quick --workloads null malloc --depths 32
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import goals
import report
from chart import write_chart
from contenders import Bdevperf, Case, Contender, CopyLoop, Fio, Served
from measuring import Row, measure
from resting import among_idle, first_answers, rest, with_disks
from spdk_peer import check_program, spdk_vhost
from targets import (
    PACKED,
    WORKLOADS,
    Target,
    disk_files,
    drivebay,
    parse_peer,
    running,
    stop_all,
    storage_daemon,
    storage_daemon_nodes,
)

from drivebay.errors import DrivebayError
from drivebay.rpc.client import RpcError

DEPTHS = (1, 32, 128)
RWS = ("randread", "randwrite")


@dataclass
class Field:
    """Everybody who takes part."""

    targets: list[Target] = field(default_factory=list)
    contenders: list[Contender] = field(default_factory=list)

    def add(self, target: Target, *, packed: bool = False) -> None:
        self.targets.append(target)
        self.contenders.append(Served(target))
        if packed:
            self.contenders.append(Served(target, suffix=goals.PACKED, packed=True))


def prepare(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Field:
    """Start what has to be started, and give each its disks; ended with the stack."""
    found = Field()
    stack.callback(stop_all, found.targets)
    places = {"file hot": Path("/dev/shm"), "file direct": options.disk}
    places = {key: place for key, place in places.items() if key in options.workloads}

    def files(owner: str, more: Sequence[str] = ()) -> dict[str, Path]:
        wanted = places | {key: Path("/dev/shm") for key in more if key in options.workloads}
        return stack.enter_context(disk_files(wanted, owner))

    ours = drivebay(folder / "ours", goals.OURS)
    found.add(ours, packed=True)
    our_files = files("drivebay")
    _start(ours, options.workloads, our_files)
    if options.spdk is not None:
        spdk = spdk_vhost(options.spdk, folder / "spdk", options.bdevperf is not None)
        found.add(spdk, packed=True)
        _start(spdk, options.workloads, files("spdk"))
        if options.bdevperf is not None:
            check_program(options.bdevperf)
            found.contenders.append(Bdevperf(spdk, options.bdevperf))
    if shutil.which("qemu-storage-daemon"):
        nodes = storage_daemon_nodes(options.workloads, files("qemu", ["malloc"]))
        found.add(storage_daemon(folder / "qsd", nodes))
    for number, text in enumerate(options.peer):
        found.add(parse_peer(text, folder / f"peer{number}"))
    if "malloc" in options.workloads:
        found.contenders.append(CopyLoop(folder / "copy"))
    if shutil.which("fio"):
        found.contenders.append(Fio(our_files))
    return found


def _start(target: Target, workloads: Sequence[str], files: dict[str, Path]) -> None:
    target.start()
    for workload in workloads:
        target.add_disk(workload, files.get(workload))
        if workload in ("null", "malloc"):
            _add_packed(target, workload)
    target.pause()


def _add_packed(target: Target, workload: str) -> None:
    """The same with packed rings, if the target has them."""
    try:
        target.add_disk(workload + PACKED)
    except RpcError as error:
        print(f"{target.name}, {workload}: no packed ring: {error}")


def measure_resting(
    folder: Path, options: argparse.Namespace, found: dict[str, dict[str, float]]
) -> None:
    """Start, memory and idle time with many disks; one busy disk among idle ones.

    Ours come first, into ``found``.
    """
    disks, seconds = options.disks, options.idle_seconds

    def ours(at: Path, names: Sequence[str]) -> Target:
        return with_disks(drivebay(at), names)

    def spdk(at: Path, names: Sequence[str]) -> Target:
        return with_disks(spdk_vhost(options.spdk, at, False), names)

    def daemon(at: Path, names: Sequence[str]) -> Target:
        return storage_daemon(at, storage_daemon_nodes(names, {}))

    lone, crowd = among_idle(folder / "idle", options.idle, options.repeat, options.runtime)
    found[goals.OURS] = rest(ours, folder / "rest-ours", disks, seconds)
    found[goals.OURS]["first_answer_s"] = first_answers(ours, folder / "first-ours", options.repeat)
    found[goals.OURS]["among_idle"] = crowd / lone
    if options.spdk is not None:
        found["spdk"] = rest(spdk, folder / "rest-spdk", disks, seconds)
        found["spdk"]["first_answer_s"] = first_answers(spdk, folder / "first", options.repeat)
    if shutil.which("qemu-storage-daemon"):
        found["qemu-storage-daemon"] = rest(daemon, folder / "rest-qsd", disks, seconds)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = report.parser_of(
        __doc__,
        runtime=3.0,
        repeat=5,
        quick="2 repetitions of 0.3 s, results in a temporary folder",
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "drivebay"
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--rw", nargs="+", choices=RWS, default=list(RWS))
    add("--depths", nargs="+", type=int, default=list(DEPTHS))
    add("--spdk", type=Path, metavar="PROGRAM", help="SPDK's vhost; needs free huge pages")
    add("--bdevperf", type=Path, metavar="PROGRAM", help="SPDK's bdevperf, to check our own load")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME,WORKLOAD=SOCKET,…[,command=COMMAND]",
        help="one more target; without a command it runs already, and must not poll core 0",
    )
    add("--disk", type=Path, default=cache, help="where the files for O_DIRECT lie")
    add("--skip-resting", action="store_true", help="measure load only")
    add("--disks", type=int, default=100, help="of the idle targets")
    add("--idle", type=int, default=256, help="disks beside the busy one")
    add("--idle-seconds", type=float, default=10.0)
    add("--name", default="vhost_blk", help="of the result's files")
    options = report.parse(parser, words)
    if options.quick:
        options.runtime, options.repeat, options.idle_seconds = 0.3, 2, 0.5
        options.disks, options.idle = min(options.disks, 8), min(options.idle, 8)
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Everything, printed and saved; returns the rows."""
    report.need_two_cores()
    cases = [Case(w, rw, d) for w in options.workloads for rw in options.rw for d in options.depths]
    with tempfile.TemporaryDirectory(prefix="drivebay-bench-") as name:
        folder = Path(name)
        with ExitStack() as stack:
            found = prepare(folder, options, stack)
            stack.enter_context(running(found.targets))
            rows = measure(
                cases,
                found.contenders,
                found.targets,
                repeat=options.repeat,
                seconds=options.runtime,
                show=lambda row: print(report.line(row), flush=True),
            )
        resting: dict[str, dict[str, float]] = {}
        if not options.skip_resting:
            try:
                measure_resting(folder, options, resting)
            except DrivebayError as error:  # of a peer, maybe; what was measured is not lost
                print(f"what rests was not measured to the end: {error}")
    _report(rows, resting, options)
    return rows


def _report(
    rows: list[Row], resting: dict[str, dict[str, float]], options: argparse.Namespace
) -> None:
    reached = goals.goals(rows, resting)
    if options.quick:
        print("\nA quick run shows that everything works; its figures say nothing.")
    print(f"\n{report.ratio_tables(rows)}\n{report.resting_table(resting)}\n")
    print(f"{report.agreements(rows)}\n\n{report.show_goals(reached)}")
    path = report.save(
        options.out,
        options.name,
        {
            "runtime_s": options.runtime,
            "repeat": options.repeat,
            "rows": [row.as_json() for row in rows],
            "resting": resting,
            "goals": [goal.as_json() for goal in reached],
        },
    )
    write_chart(path.with_suffix(".svg"), rows)
    print(f"\nwritten: {path} and .svg")


if __name__ == "__main__":
    sys.exit(report.main(lambda: run(parse(sys.argv[1:]))))
