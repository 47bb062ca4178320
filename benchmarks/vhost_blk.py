#!/usr/bin/env python3
"""Compare vhost-user-blk targets side by side: throughput, cost, idle, start, memory.

Each target runs on core 0, the load on core 1; within a repetition the targets take
turns, since the machine's speed drifts. Quoted is the median, with the spread. Rows
compare only equal durability: reads, and writes that both sides acknowledge alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chart import write_chart
from targets import (
    DIRECT_BYTES,
    DISK_BYTES,
    Target,
    add_disk,
    drivebay,
    make_file,
    parse_other,
    running,
    storage_daemon,
    wait_for_rpc,
)

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_workload import LoadParams, LoadResult, Workload, run_load

LOAD_CORE = 1
WORKLOADS = ("null", "malloc", "file hot", "file direct")
DEPTHS = (1, 32, 128)
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of the table: a workload at a depth on one target."""

    target: str
    workload: str
    rw: str
    depth: int
    iops: list[float]
    cpu_ns: list[float]  # target CPU time per request, at a fixed rate; depth 32 only
    busy_ns: list[float]  # the same without polling in vain; ours only
    features: list[str]
    write_cache: bool

    @property
    def median(self) -> float:
        return statistics.median(self.iops)


def prepare(folder: Path, disk: Path) -> tuple[Target, Target]:
    """Ours and QEMU's, with the same four disks; ours is started to be given them."""
    ours = drivebay(folder / "ours")
    ours.start()
    client = ours.client = wait_for_rpc(folder / "ours")
    blocks = DISK_BYTES // 512
    memory = Path("/dev/shm")
    files = {
        "malloc": make_file(memory / f"drivebay-bench-{os.getpid()}-a"),
        "file hot": make_file(memory / f"drivebay-bench-{os.getpid()}-b"),
        "file direct": make_file(disk / "bench-qemu.img", DIRECT_BYTES),
    }
    add_disk(client, ours, "null", "bdev_null_create", num_blocks=blocks)
    add_disk(client, ours, "malloc", "bdev_malloc_create", num_blocks=blocks)
    hot = make_file(memory / f"drivebay-bench-{os.getpid()}-c")
    add_disk(client, ours, "file hot", "bdev_uring_create", filename=str(hot))
    direct = make_file(disk / "bench-drivebay.img", DIRECT_BYTES)
    add_disk(client, ours, "file direct", "bdev_aio_create", filename=str(direct))
    return ours, storage_daemon(folder / "qsd", files)


def load(target: Target, workload: str, rw: str, depth: int, **more: Any) -> LoadResult:
    # Both sides acknowledge writes alike: a null disk has no cache, the others write back.
    cache = None if workload == "null" else True
    socket, kind = str(target.sockets[workload]), Workload(rw)
    return run_load(
        LoadParams(socket, kind, depth=depth, core=LOAD_CORE, write_cache=cache, **more)
    )


def measure(targets: list[Target], options: argparse.Namespace) -> list[Row]:
    """All rows; the targets alternate within each repetition."""
    rows: list[Row] = []
    for workload in options.workloads:
        for rw in ("randread", "randwrite"):
            for depth in options.depths:
                rows += measure_one(targets, workload, rw, depth, options)
    return rows


def measure_one(
    targets: list[Target], workload: str, rw: str, depth: int, options: argparse.Namespace
) -> list[Row]:
    having = [target for target in targets if workload in target.sockets]
    found = {t.name: Row(t.name, workload, rw, depth, [], [], [], [], False) for t in having}
    for _ in range(options.repeat):
        for target in having:
            result = load(target, workload, rw, depth, runtime_s=options.runtime)
            row = found[target.name]
            row.iops.append(result.iops)
            row.features, row.write_cache = result.features, result.write_cache
    if depth == 32:
        rate = 0.5 * min(row.median for row in found.values())
        for _ in range(options.repeat):
            for target in having:
                before, busy = target.cpu_seconds(), busy_seconds(target)
                result = load(target, workload, rw, depth, runtime_s=options.runtime, rate=rate)
                used = target.cpu_seconds() - before
                done = result.reads + result.writes
                found[target.name].cpu_ns.append(used / done * 1e9)
                if target.client is not None:
                    worked = busy_seconds(target) - busy
                    found[target.name].busy_ns.append(worked / done * 1e9)
    for row in found.values():
        print(describe(row), flush=True)
    return list(found.values())


def busy_seconds(target: Target) -> float:
    return target.busy_seconds() if target.client is not None else 0.0


def describe(row: Row) -> str:
    return (
        f"{row.workload:12} {row.rw:10} {row.depth:4}  {row.target:20} {spread(row)}  {cost(row)}"
    )


def spread(row: Row) -> str:
    return f"{row.median / 1000:,.0f} ({min(row.iops) / 1000:,.0f} to {max(row.iops) / 1000:,.0f})"


def cost(row: Row) -> str:
    if not row.cpu_ns:
        return ""
    busy = f", {statistics.median(row.busy_ns):,.0f} busy" if row.busy_ns else ""
    return f"{statistics.median(row.cpu_ns):,.0f} ns{busy}"


def resting(folder: Path, seconds: float) -> dict[str, float]:
    """Start-up, memory and idle CPU with 100 controllers, then with 100 sessions."""
    began = time.monotonic()
    ours = drivebay(folder / "resting")
    with running([ours]):
        client = wait_for_rpc(folder / "resting")
        client.call("spdk_get_version")
        first_answer = time.monotonic() - began
        for number in range(100):
            add_disk(client, ours, f"d{number}", "bdev_null_create", num_blocks=2048)
        resident = ours.resident_bytes()
        sessions = [VhostUserBlk(str(path)) for path in ours.sockets.values()]
        for session in sessions:
            session.read(0, 4096)
        before = ours.cpu_seconds()
        time.sleep(seconds)
        idle = (ours.cpu_seconds() - before) / seconds
        for session in sessions:
            session.close()
    return {
        "first_rpc_answer_s": first_answer,
        "resident_mib_100_controllers": resident / 2**20,
        "idle_cpu_percent_100_sessions": idle * 100,
    }


def ratio_tables(rows: list[Row], base: str = "drivebay") -> str:
    """Markdown, one table for each other target: throughput, ratio, cost."""
    ours = {(r.workload, r.rw, r.depth): r for r in rows if r.target == base}
    lines = []
    for name in dict.fromkeys(row.target for row in rows if row.target != base):
        lines.append(f"| 4 KiB, thousand a second | depth | {base} | {name} | ratio | CPU each |")
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            mine = ours.get((row.workload, row.rw, row.depth))
            if row.target != name or mine is None:
                continue
            costs = f"{cost(mine)} / {cost(row)}" if row.cpu_ns else ""
            lines.append(
                f"| {row.workload}, {row.rw} | {row.depth} | {spread(mine)} | {spread(row)} "
                f"| {mine.median / row.median:.1f} | {costs} |"
            )
        lines.append("")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runtime", type=float, default=3.0, help="seconds of one measurement")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", default="vhost_blk", help="of the files in benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="3 repetitions of half a second")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME,WORKLOAD=SOCKET,…,command=COMMAND",
        help="one more target, pinned like the others",
    )
    options = parser.parse_args()
    if options.quick:
        options.runtime, options.repeat = 0.5, 3
    return options


def main() -> None:
    options = parse()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed: one for the target, one for the load")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "drivebay"
    with tempfile.TemporaryDirectory(prefix="drivebay-bench-") as name:
        folder = Path(name)
        targets = list(prepare(folder, cache))
        targets += [parse_other(text, folder / f"t{i}") for i, text in enumerate(options.target)]
        try:
            with running(targets):
                rows = measure(targets, options)
            rest = resting(folder, 10.0)
        finally:
            targets[0].stop()
            for path in Path("/dev/shm").glob(f"drivebay-bench-{os.getpid()}-*"):
                path.unlink()
            for path in cache.glob("bench-*.img"):
                path.unlink()
    report(rows, rest, options)


def report(rows: list[Row], rest: dict[str, float], options: argparse.Namespace) -> None:
    print("\n" + ratio_tables(rows) + "\n")
    for key, value in rest.items():
        print(f"{key:32} {value:8.2f}")
    for target in dict.fromkeys(row.target for row in rows):
        for row in rows:
            if row.target == target and row.rw == "randwrite" and row.depth == options.depths[0]:
                cache = "write-back" if row.write_cache else "write-through or no cache"
                print(f"{target}, {row.workload}: {cache}; {' '.join(row.features)}")
    stamp = time.strftime("%Y-%m-%d")
    RESULTS.mkdir(exist_ok=True)
    found = {
        "date": stamp,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "runtime_s": options.runtime,
        "repeat": options.repeat,
        "rows": [asdict(row) for row in rows],
        "resting": rest,
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    write_chart(RESULTS / f"{options.name}.svg", rows)
    print(f"\nwritten: {RESULTS / options.name}.json and .svg")


if __name__ == "__main__":
    main()
