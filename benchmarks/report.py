"""Tables as Markdown, and the files in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from goals import OURS, OURS_PACKED, PACKED, Goal, table
from measuring import Row, spread

from drivebay.errors import DrivebayError
from drivebay.rpc.client import RpcError

RESULTS = Path(__file__).parent / "results"


def line(row: Row) -> str:
    """A row as it is measured, for who watches."""
    return (
        f"{row.workload:12} {row.rw:10} {row.depth:4}  {row.target:22} "
        f"{spread(row.iops):28} {cost(row)}"
    )


def cost(row: Row) -> str:
    """Time of the target for each request: all of it, and what its reactors call work."""
    cpu = row.figure("cpu_ns", at_rate=True)
    if cpu is None:
        return ""
    busy = row.figure("busy_ns", at_rate=True)
    return f"{cpu:,.0f} ns" + ("" if busy is None else f", {busy:,.0f} busy")


def ratio_tables(rows: Sequence[Row]) -> str:
    """One table for each other contender: throughput, ratio, cost. Packed meets packed."""
    lines = []
    for name in dict.fromkeys(row.target for row in rows if row.target != OURS):
        base = OURS_PACKED if name.endswith(PACKED) and name != OURS_PACKED else OURS
        ours = {row.case: row for row in rows if row.target == base}
        lines.append(f"| 4 KiB, thousand a second | depth | {base} | {name} | ratio | time each |")
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            mine = ours.get(row.case)
            if row.target != name or mine is None:
                continue
            costs = f"{cost(mine)} / {cost(row)}" if row.at_rate else ""
            lines.append(
                f"| {row.workload}, {row.rw} | {row.depth} | {spread(mine.iops)} "
                f"| {spread(row.iops)} | {mine.median / row.median:.2f} | {costs} |"
            )
        lines.append("")
    return "\n".join(lines)


def agreements(rows: Sequence[Row]) -> str:
    """What was negotiated, for each contender and workload, to see that like meets like."""
    found = {(row.target, row.workload): row.agreed for row in rows if row.agreed}
    return "\n".join(f"{who}, {workload}: {text}" for (who, workload), text in found.items())


def resting_table(resting: dict[str, dict[str, float]]) -> str:
    keys = list(dict.fromkeys(key for figures in resting.values() for key in figures))
    lines = ["| | " + " | ".join(keys) + " |", "|---|" + "---|" * len(keys)]
    for who, figures in resting.items():
        cells = (f"{figures[key]:.3g}" if key in figures else "" for key in keys)
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    """The machine in one line."""
    cpu = "unknown processor"
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            cpu = text.partition(":")[2].strip()
            break
    return f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}"


def save(folder: Path, name: str, found: dict[str, Any]) -> Path:
    """Write the results as JSON, with where and when."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **found}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def parser_of(
    doc: str | None, *, runtime: float, repeat: int, quick: str
) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what --quick measures."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runtime", type=float, default=runtime, help="seconds of one measurement")
    add("--repeat", type=int, default=repeat)
    add("--quick", action="store_true", help=quick)
    add("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options; a quick run is short, and its results go where nobody looks for any."""
    options = parser.parse_args(words)
    if options.quick:
        options.runtime, options.repeat = 0.2, 1
    if options.out is None:
        options.out = _quick_results() if options.quick else RESULTS
    return options


def _quick_results() -> Path:
    """Where results go that nobody should take for results."""
    return Path(tempfile.gettempdir()) / "drivebay-bench-results"


def need_two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        raise DrivebayError("two cores are needed: one for the target, one for the load")


def main(run: Callable[[], object]) -> int:
    """Run a benchmark; an error that somebody can mend is a sentence and not a traceback.

    Told to end, it takes its targets and files with it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run()
    except (DrivebayError, RpcError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        if isinstance(error, DrivebayError) and error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def show_goals(found: Sequence[Goal]) -> str:
    missed = sum(not goal.met for goal in found)
    return f"{table(found)}\n\n{len(found) - missed} of {len(found)} goals are met"
