#!/usr/bin/env python3
"""What layers of bdevs cost: throughput of stacks on malloc disks against the bare one, the
first writes of a thin volume, snapshots, and the opening of a store with many volumes.

All stacks are in one target, and take turns within each repetition; a cost is the median of
the ratios within the repetitions. What the target has no methods for is left out. With SPDK's
program its stacks and first writes are measured too:

    bdev_stack.py --spdk PATH/vhost
    bdev_stack.py --quick
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import many_volumes
import report
from contenders import Case, Sample, Served
from goals import OURS, Goal
from measuring import spread
from spdk_peer import spdk_vhost
from targets import DISK_BYTES, LOAD_CORE, Target, alone, drivebay, running, stop_all

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_workload import LoadParams, Workload, run_load
from drivebay.errors import DrivebayError

BARE = "malloc"
RWS = ("randread", "randwrite")
DEPTH = 32
CLUSTER_BYTES = 64 << 10
STORE_BYTES = 64 << 30  # whose data a null disk takes: only what the store does is measured
KEPT_BYTES = 64 << 20  # more than the metadata of such a store take
SMALL_STORE_BYTES = 256 << 20
LIMITS_S = {"snapshot": 0.05, **many_volumes.LIMITS_S}

Build = Callable[[Target, str], str]  # (target, the malloc disk) -> the bdev on top


def passthru(target: Target, base: str) -> str:
    name = f"{base}-p"
    target.call("bdev_passthru_create", name=name, base_bdev_name=base)
    return name


def five_passthrus(target: Target, base: str) -> str:
    for _ in range(5):
        base = passthru(target, base)
    return base


def split(target: Target, base: str) -> str:
    names = target.call("bdev_split_create", base_bdev=base, split_count=1)
    return str(names[0])


def thick(target: Target, base: str) -> str:
    """A volume that has all its clusters, in a store of its own."""
    store = f"{base}-s"
    target.call("bdev_lvol_create_lvstore", bdev_name=base, lvs_name=store)
    [found] = target.call("bdev_lvol_get_lvstores", lvs_name=store)
    mebibytes = found["free_clusters"] * found["cluster_size"] >> 20
    target.call("bdev_lvol_create", lvol_name="thick", size_in_mib=mebibytes, lvs_name=store)
    return f"{store}/thick"


def delay(target: Target, base: str) -> str:
    """A delay of nothing."""
    name = f"{base}-d"
    times = dict.fromkeys(("avg_read_latency", "p99_read_latency"), 0)
    times |= dict.fromkeys(("avg_write_latency", "p99_write_latency"), 0)
    target.call("bdev_delay_create", name=name, base_bdev_name=base, **times)
    return name


def error(target: Target, base: str) -> str:
    """An error bdev that injects none."""
    target.call("bdev_error_create", base_name=base)
    return f"EE_{base}"


def with_a_volume(target: Target, base: str) -> str:
    """As high as it can be with a volume in it: an I/O has room for the frames of no more."""
    return passthru(target, passthru(target, thick(target, split(target, base))))


def without_a_volume(target: Target, base: str) -> str:
    """The same of those that push frames of their own."""
    return delay(target, error(target, split(target, base)))


@dataclass(frozen=True)
class Stack:
    """One way to pile bdevs up, which RPC methods it takes, and what it may cost."""

    name: str
    build: Build
    needs: tuple[str, ...] = ()
    limit_percent: float = 0.0


_LVOL = ("bdev_lvol_create_lvstore", "bdev_lvol_create")
_STORES = (*_LVOL, "bdev_lvol_snapshot", "bdev_raid_create")
STACKS = (
    Stack(BARE, lambda target, base: base),
    Stack("split", split, ("bdev_split_create",), 5),
    Stack("thick lvol", thick, _LVOL, 5),
    Stack("passthru x5", five_passthrus, ("bdev_passthru_create",), 20),
    Stack(
        "split, lvol, passthru x2",
        with_a_volume,
        ("bdev_split_create", "bdev_passthru_create", *_LVOL),
        20,
    ),
    Stack(
        "split, error, delay",
        without_a_volume,
        ("bdev_split_create", "bdev_error_create", "bdev_delay_create"),
        20,
    ),
    Stack("malloc again", lambda target, base: base),  # what differs here is noise
)


@dataclass
class Row:
    """One stack of one target in one case; a sample for each repetition."""

    target: str
    stack: str
    rw: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def iops(self) -> list[float]:
        return [sample.iops for sample in self.samples]

    def busy_ns(self) -> float:
        return statistics.median(sample.busy_ns or 0.0 for sample in self.samples)

    def as_json(self) -> dict[str, Any]:
        kept = ("iops", "cpu_ns", "busy_ns")
        samples = [{k: v for k, v in vars(s).items() if k in kept} for s in self.samples]
        return {"target": self.target, "stack": self.stack, "rw": self.rw, "samples": samples}


def cost_percent(row: Row, bare: Row) -> float:
    """How much slower than the bare disk, which ran in the same repetitions."""
    ratios = [mine / other for mine, other in zip(row.iops, bare.iops, strict=True)]
    return 100 * (1 - statistics.median(ratios))


def methods(target: Target) -> set[str]:
    return set(target.call("rpc_get_methods"))


def malloc(target: Target, name: str, size: int = DISK_BYTES, block_size: int = 512) -> str:
    blocks = size // block_size
    target.call("bdev_malloc_create", name=name, block_size=block_size, num_blocks=blocks)
    return name


def prepare(target: Target, stacks: Sequence[Stack]) -> list[str]:
    """Build the stacks that the target has methods for, each with a controller."""
    known = methods(target)
    built = []
    for number, stack in enumerate(stacks):
        if not known.issuperset(stack.needs):
            print(f"{target.name} has no {stack.name}")
            continue
        top = stack.build(target, malloc(target, f"m{number}"))
        fill(serve(target, stack.name, f"vhost.{number}", top))
        built.append(stack.name)
    return built


def serve(target: Target, workload: str, controller: str, bdev: str) -> Path:
    """Returns: the socket."""
    target.call("vhost_create_blk_controller", ctrlr=controller, dev_name=bdev)
    target.sockets[workload] = target.log.parent / controller
    return target.sockets[workload]


def fill(socket: Path) -> None:
    """Write all of a disk: a new volume gave the memory below it back to the host."""
    chunk = os.urandom(1 << 20)
    with VhostUserBlk(str(socket)) as disk:
        for offset in range(0, disk.capacity_bytes, len(chunk)):
            disk.write(offset, chunk[: disk.capacity_bytes - offset])


def measure_stacks(
    targets: Sequence[Target], built: dict[str, list[str]], options: argparse.Namespace
) -> list[Row]:
    """Each stack of each target has its turn in each repetition."""
    rows = [
        Row(target.name, stack, rw)
        for rw in RWS
        for target in targets
        for stack in built[target.name]
    ]
    by_name = {target.name: target for target in targets}
    for number in range(options.repeat):
        for row in rows:
            target = by_name[row.target]
            with alone(target, targets):
                case = Case(row.stack, row.rw, DEPTH)
                row.samples.append(Served(target).run(case, options.runtime, None))
        print(f"repetition {number + 1} of {options.repeat} is done", flush=True)
    return rows


# --- volumes -------------------------------------------------------------------------------


@contextmanager
def store_on(target: Target, disk: str, **more: int) -> Iterator[str]:
    store = f"{disk}-s"
    target.call("bdev_lvol_create_lvstore", bdev_name=disk, lvs_name=store, **more)
    yield store
    target.call("bdev_lvol_delete_lvstore", lvs_name=store)


@contextmanager
def disk_without_data(target: Target) -> Iterator[str]:
    """A disk that keeps its first bytes, where a store has its metadata, and nothing behind.

    SPDK reads the metadata back, so null alone will not do.
    """
    for kind, size in (("malloc", KEPT_BYTES), ("null", STORE_BYTES)):
        target.call(f"bdev_{kind}_create", name=kind, block_size=4096, num_blocks=size // 4096)
    bases = {"base_bdevs": ["malloc", "null"], "raid_level": "concat", "strip_size_kb": 64}
    target.call("bdev_raid_create", name="concat", **bases)
    yield "concat"
    target.call("bdev_raid_delete", name="concat")
    for kind in ("malloc", "null"):
        target.call(f"bdev_{kind}_delete", name=kind)


def first_writes(target: Target, seconds: float) -> float:
    """First writes a second of a fresh thin volume: each fills a cluster that was not there."""
    mebibytes = (STORE_BYTES >> 20) * 7 // 8
    sizes = {"cluster_sz": CLUSTER_BYTES, "num_md_pages_per_cluster_ratio": 1}
    with disk_without_data(target) as disk, store_on(target, disk, **sizes) as store:
        volume = {"lvol_name": "v", "size_in_mib": mebibytes, "lvs_name": store}
        target.call("bdev_lvol_create", **volume, thin_provision=True)
        serve(target, "thin", "vhost.thin", f"{store}/v")
        result = run_load(
            LoadParams(
                str(target.sockets.pop("thin")),
                Workload.WRITE,
                block_bytes=CLUSTER_BYTES,
                depth=DEPTH,
                core=LOAD_CORE,
                runtime_s=seconds,
            )
        )
        target.call("vhost_delete_controller", ctrlr="vhost.thin")
    if result.errors or result.writes > (mebibytes << 20) // CLUSTER_BYTES:
        raise DrivebayError(
            f"{result.writes} first writes, errors {result.errors}",
            hint="a shorter --runtime writes no cluster twice",
        )
    return result.iops


def snapshot_seconds(target: Target, gibibytes: int, repeat: int) -> list[float]:
    """Snapshots of a thin volume of this size, in a store that has far less."""
    times = []
    disk = malloc(target, "small", SMALL_STORE_BYTES, 4096)
    with store_on(target, disk) as store:
        volume = {"lvol_name": "v", "size_in_mib": gibibytes << 10, "lvs_name": store}
        target.call("bdev_lvol_create", **volume, thin_provision=True)
        for number in range(repeat):
            taken = {"lvol_name": f"{store}/v", "snapshot_name": f"snapshot{number}"}
            began = time.monotonic()
            target.call("bdev_lvol_snapshot", **taken)
            times.append(time.monotonic() - began)
    target.call("bdev_malloc_delete", name=disk)
    return times


def measure_volumes(
    targets: Sequence[Target], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """What is measured about stores, of those targets that have them."""
    found: dict[str, Any] = {}
    having = [target for target in targets if _has_volumes(target, targets)]
    for _ in range(options.repeat):
        for target in having:
            with alone(target, targets):
                rate = first_writes(target, min(options.runtime, 0.5))
                found.setdefault(f"first writes, {target.name}", []).append(rate)
    for target in having[:1]:
        with alone(target, targets):
            for gibibytes in (1, 1024):
                times = snapshot_seconds(target, gibibytes, options.repeat)
                found[f"snapshot of {gibibytes} GiB, s"] = times
            repeat = min(options.repeat, 3)
            found |= many_volumes.measure(target, folder, options.volumes, repeat)
    return found


def _has_volumes(target: Target, targets: Sequence[Target]) -> bool:
    with alone(target, targets):
        return methods(target).issuperset(_STORES)


# --- what came out -------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: throughput in thousands, cost against the bare disk, the reactor's time each."""
    lines = [
        "| 4 KiB, depth 32 | target | thousand a second | cost, % | ns each |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        bare = next(r for r in rows if (r.target, r.stack, r.rw) == (row.target, BARE, row.rw))
        lines.append(
            f"| {row.stack}, {row.rw} | {row.target} | {spread(row.iops)} "
            f"| {cost_percent(row, bare):.1f} | {row.busy_ns():,.0f} |"
        )
    return "\n".join(lines)


def goals(rows: Sequence[Row], volumes: dict[str, Any]) -> list[Goal]:
    limits = {stack.name: stack.limit_percent for stack in STACKS}
    found = []
    for row in rows:
        if row.target == OURS and limits[row.stack]:
            bare = next(r for r in rows if (r.target, r.stack, r.rw) == (OURS, BARE, row.rw))
            text = f"{row.stack}, {row.rw}: percent of the bare disk's throughput lost"
            found.append(Goal(text, limits[row.stack], cost_percent(row, bare), at_least=False))
    ours, theirs = (volumes.get(f"first writes, {name}") for name in (OURS, "spdk"))
    if ours and theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        found.append(Goal("thin first writes against spdk", 1.5, ratio))
    for name, times in volumes.items():
        limit = next((limit for what, limit in LIMITS_S.items() if name.startswith(what)), None)
        if limit is not None:
            found.append(Goal(name, limit, statistics.median(times), at_least=False))
    return found


def run(options: argparse.Namespace) -> None:
    report.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="drivebay-stack-") as name, ExitStack() as stack:
        folder = Path(name)
        targets = [drivebay(folder / "ours", OURS)]
        if options.spdk is not None:
            targets.append(spdk_vhost(options.spdk, folder / "spdk", False))
        stack.callback(stop_all, targets)
        stack.enter_context(running(targets))
        built = {}
        for target in targets:
            with alone(target, targets):
                built[target.name] = prepare(target, STACKS)
        rows = measure_stacks(targets, built, options)
        volumes = measure_volumes(targets, folder, options)
    found = goals(rows, volumes)
    print(f"\n{table(rows)}\n")
    for what, values in volumes.items():
        seconds = what.endswith(", s")
        shown = f"{what[:-1]}ms" if seconds else what
        print(f"{shown}: {spread(values, 0.001 if seconds else 1.0)}")
    print(f"\n{report.show_goals(found)}")
    path = report.save(
        options.out,
        options.name,
        {
            "runtime_s": options.runtime,
            "repeat": options.repeat,
            "rows": [row.as_json() for row in rows],
            "volumes": volumes,
            "goals": [goal.as_json() for goal in found],
        },
    )
    print(f"\nwritten: {path}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = report.parser_of(
        __doc__, runtime=1.0, repeat=7, quick="1 repetition of 0.2 s, 50 volumes"
    )
    add = parser.add_argument
    add("--spdk", type=Path, help="SPDK's program vhost")
    add("--volumes", type=int, default=10_000, help="in the store that is opened")
    add("--name", default="bdev_stack", help="of the result's file")
    options = report.parse(parser, words)
    if options.quick:
        options.volumes = 50
    return options


if __name__ == "__main__":
    sys.exit(report.main(lambda: run(parse(sys.argv[1:]))))
