"""`drivebay bench SOCKET`: put load on any vhost-user-blk target, measure, and verify.

Context: a short-lived process that is a driver of its own; it reaches the target
only through the vhost-user socket, as a virtual machine does.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from drivebay.cli.arguments import Parser, add_json_option, parse_size
from drivebay.cli.output import DONE, print_json, print_table
from drivebay.engines.vhost_user_connection import CannotConnect, TargetGone
from drivebay.engines.vhost_user_workload import (
    RECONNECT_S,
    Latency,
    LoadParams,
    LoadResult,
    Workload,
    run_load,
)
from drivebay.errors import DrivebayError, PeerError, Unreachable

__all__ = ["build_parser", "main"]

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
_RATE = re.compile(r"(\d+(?:\.\d+)?)([km]?)", re.IGNORECASE | re.ASCII)
_RATE_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_EPILOG = """\
examples:
  drivebay bench /var/tmp/vhost.0 --rw randread --bs 4k --depth 32 --runtime 5
  drivebay bench /var/tmp/vhost.0 --rw randrw --verify --size 64M
  drivebay bench /var/tmp/vhost.0 --rw randread --rate 300k --json
  drivebay bench /var/tmp/vhost.0 --rw randrw --verify --reconnect --runtime 600

Writing workloads overwrite the disk. See docs/bench.md.
"""


class BenchFailed(DrivebayError):
    """The load ran to its end, and something about it was wrong."""


def main(arguments: list[str]) -> int:
    """Run one load and print what it measured."""
    found = build_parser().parse_args(arguments)
    try:
        result = run_load(_params(found))
    except (CannotConnect, TargetGone) as error:
        raise Unreachable(str(error), hint=error.hint) from error
    if found.json:
        print_json(result.as_json())
    else:
        _print_result(result)
    if result.first_mismatch is not None:
        raise PeerError(
            f"{result.mismatched_blocks} of {result.verified_blocks} verified blocks are wrong, "
            f"the first at {result.first_mismatch}"
        )
    if result.errors:
        raise BenchFailed(f"requests failed: {_error_list(result.errors)}")
    return INTERRUPTED if result.interrupted else DONE


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        "drivebay bench",
        description="Put load on a vhost-user-blk socket and measure it.",
        epilog=_EPILOG,
    )
    defaults = LoadParams("")
    parser.add_argument("socket", metavar="SOCKET", help="the target's vhost-user socket")
    parser.add_argument(
        "--rw",
        choices=[workload.value for workload in Workload],
        default=defaults.workload.value,
        help="what to do, by fio's names (default: %(default)s)",
    )
    parser.add_argument(
        "--rwmixread",
        type=int,
        metavar="PERCENT",
        default=defaults.read_percent,
        help="share of reads in randrw (default: %(default)s)",
    )
    parser.add_argument(
        "--bs",
        type=parse_size,
        metavar="SIZE",
        default=defaults.block_bytes,
        help="bytes of a request (default: 4k)",
    )
    for name, default, text in (
        ("--depth", defaults.depth, "requests in flight on each queue"),
        ("--queues", defaults.queues, "queues, all driven by one thread"),
    ):
        parser.add_argument(
            name, type=int, metavar="N", default=default, help=f"{text} (default: %(default)s)"
        )
    _add_extent_options(parser, defaults)
    parser.add_argument(
        "--core", type=int, metavar="N", help="core of the load's thread (default: the last one)"
    )
    parser.add_argument(
        "--write-cache",
        choices=["on", "off"],
        help="ask for write-back or write-through (default: as the target has it)",
    )
    parser.add_argument(
        "--hugepages", action="store_true", help="keep the buffers in free 2 MiB huge pages"
    )
    parser.add_argument(
        "--interrupts",
        action="store_true",
        help="sleep until the target calls, as a guest does (default: poll)",
    )
    add_json_option(parser)
    return parser


def _add_extent_options(parser: Parser, defaults: LoadParams) -> None:
    """Add what says how long, how fast, where, and how carefully."""
    parser.add_argument(
        "--runtime",
        type=float,
        metavar="SECONDS",
        default=defaults.runtime_s,
        help="how long (default: %(default)g)",
    )
    parser.add_argument(
        "--rate",
        type=_parse_rate,
        metavar="IOPS",
        help="requests a second, such as 300k, due at fixed times (default: as many as can be)",
    )
    parser.add_argument(
        "--offset", type=parse_size, metavar="SIZE", default=0, help="where the range begins"
    )
    parser.add_argument(
        "--size", type=parse_size, metavar="SIZE", help="length of the range (default: to the end)"
    )
    parser.add_argument(
        "--fsync",
        type=int,
        metavar="N",
        default=defaults.fsync,
        help="flush after every N writes of a queue (default: never)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="stamp what is written and check what is read; a writing load is read back at its end",
    )
    parser.add_argument(
        "--reconnect",
        action="store_true",
        help="when the target goes away, wait for it and go on with the requests in flight "
        f"(at most {RECONNECT_S:g} s each time)",
    )


def _params(found: argparse.Namespace) -> LoadParams:
    return LoadParams(
        socket=found.socket,
        workload=Workload(found.rw),
        block_bytes=found.bs,
        depth=found.depth,
        queues=found.queues,
        runtime_s=found.runtime,
        rate=found.rate,
        read_percent=found.rwmixread,
        offset=found.offset,
        size=found.size,
        fsync=found.fsync,
        verify=found.verify,
        core=found.core,
        hugepages=found.hugepages,
        write_cache=None if found.write_cache is None else found.write_cache == "on",
        interrupts=found.interrupts,
        reconnect_s=RECONNECT_S if found.reconnect else None,
    )


def _parse_rate(text: str) -> float:
    """Read a rate: '300000', '300k', '1.5M'; units are decimal."""
    match = _RATE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate: write a number such as 300k")
    return float(match[1]) * _RATE_UNITS[match[2].lower()]


def _print_result(result: LoadResult) -> None:
    params = result.params
    print(
        f"{params.socket}: {_size(result.capacity_bytes)}, "
        f"{'write-back' if result.write_cache else 'write-through'}, "
        f"{'packed' if result.packed else 'split'} ring of {result.queue_size}"
    )
    print(f"features  {' '.join(result.features)}")
    print(f"protocol  {' '.join(result.protocol_features)}")
    rate = "" if params.rate is None else f", {params.rate:,.0f} requests/s wanted"
    print(
        f"load      {params.workload.value} of {_size(params.block_bytes)}, depth {params.depth}, "
        f"{params.queues} queue{'s' if params.queues > 1 else ''} on core {result.core}{rate}, "
        f"{result.seconds:.2f} s{' (interrupted)' if result.interrupted else ''}"
    )
    print()
    print(f"IOPS      {result.iops:,.0f}")
    print(f"rate      {_size(result.bytes_per_s)}/s")
    print(f"requests  {result.reads} read, {result.writes} written, {result.flushes} flushed")
    print(f"kicks     {result.kicks}; {result.completions_per_poll:.1f} completions a poll")
    print(f"errors    {_error_list(result.errors) or 'none'}")
    if params.reconnect_s is not None:
        print(f"reconnects {result.reconnects}")
    if params.verify:
        print(f"verified  {result.verified_blocks} blocks, {result.mismatched_blocks} wrong")
    print()
    rows: list[list[Any]] = [["all", *_microseconds(result.latency_us)]]
    if len(result.by_kind_us) > 1:
        rows += [[kind, *_microseconds(one)] for kind, one in result.by_kind_us.items()]
    print_table(["latency, us", "mean", "p50", "p90", "p99", "p99.9", "max"], rows)


def _microseconds(latency: Latency) -> list[float]:
    values = (latency.mean, latency.p50, latency.p90, latency.p99, latency.p99_9, latency.max)
    return [round(value, 2) for value in values]


def _error_list(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in errors.items())


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.4g} {units[0]}"
