"""`drivebay target top`: what disks, controllers and reactors did in the last second.

Context: a short-lived process, or one that looks again each second until it is interrupted.
Everything comes from counters over RPC, as differences between two looks, so watching
changes nothing in the target.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from drivebay.cli.output import DONE, print_json, table_lines
from drivebay.disks.connection import call, connect

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["Look", "compare", "run", "screen_lines"]

_INTERVAL_S: Final = 1.0
_MIB: Final = 1 << 20
_OPERATIONS: Final = ("read", "write", "unmap")
_LIMITS: Final = (
    ("rw_ios_per_sec", "", "/s"),
    ("rw_mbytes_per_sec", "", " MiB/s"),
    ("r_mbytes_per_sec", "r ", " MiB/s"),
    ("w_mbytes_per_sec", "w ", " MiB/s"),
)
# Other screen, no cursor; and back.
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_END_OF_LINE: Final = "\x1b[K\n"
_REST: Final = "\x1b[J"


class Look(NamedTuple):
    """What the target's counters said at one moment; the RPC answers as they came."""

    at_s: float
    iostat: dict[str, Any]
    bdevs: list[dict[str, Any]]
    controllers: list[dict[str, Any]]
    threads: list[dict[str, Any]]
    pollers: list[dict[str, Any]]
    reactors: list[dict[str, Any]]


def run(found: argparse.Namespace) -> int:
    """Show it once, or until Ctrl-C."""
    with connect(found.socket) as client:
        if found.once:
            _show_once(client, found.json)
            return DONE
        live = sys.stdout.isatty() and not found.json
        if live:
            sys.stdout.write(_ENTER)
        try:
            _watch(client, live=live, as_json=found.json)
        except KeyboardInterrupt:
            pass  # what it is there for
        finally:
            if live:
                sys.stdout.write(_LEAVE)
                sys.stdout.flush()
    return DONE


def _show_once(client: Client, as_json: bool) -> None:
    before = _look(client)
    time.sleep(_INTERVAL_S)
    figures = compare(before, _look(client))
    if as_json:
        print_json(figures)
    else:
        print("\n".join(screen_lines(figures)))


def _watch(client: Client, *, live: bool, as_json: bool) -> None:
    before = _look(client)
    while True:
        time.sleep(_INTERVAL_S)
        after = _look(client)
        figures = compare(before, after)
        before = after
        if as_json:
            print(json.dumps(figures, ensure_ascii=False))
        elif live:
            size = shutil.get_terminal_size()
            lines = screen_lines(figures, rows=size.lines - 1)
            shown = "".join(line[: size.columns] + _END_OF_LINE for line in lines)
            sys.stdout.write(_HOME + shown + _REST)
        else:
            print("\n".join(screen_lines(figures)) + "\n")
        sys.stdout.flush()


def _look(client: Client) -> Look:
    return Look(
        time.monotonic(),
        call(client, "bdev_get_iostat"),
        call(client, "bdev_get_bdevs"),
        call(client, "vhost_get_controllers"),
        call(client, "thread_get_stats")["threads"],
        call(client, "thread_get_pollers")["threads"],
        call(client, "framework_get_reactors")["reactors"],
    )


# --- what happened between two looks -------------------------------------------------------


def compare(before: Look, after: Look) -> dict[str, Any]:
    """The figures of the time between two looks, as ``--json`` shows them."""
    return {
        "seconds": round(after.at_s - before.at_s, 3),
        "disks": _disks(before, after),
        "controllers": _controllers(before, after),
        "reactors": _reactors(before, after),
    }


def _grown(before: dict[str, Any] | None, after: dict[str, Any], name: str) -> int:
    """By how much a counter grew; one that was set back to zero starts there."""
    start = (before or {}).get(name, 0)
    grown: int = after[name] - start if after[name] >= start else after[name]
    return grown


def _called(bdev: dict[str, Any]) -> str:
    """What people call it: the bdev of a volume is named by its uuid, its alias is STORE/NAME."""
    name: str = bdev["name"]
    if name != bdev.get("uuid"):
        return name
    return next((alias for alias in bdev["aliases"] if alias != name), name)


def _disks(before: Look, after: Look) -> list[dict[str, Any]]:
    earlier = {entry["name"]: entry for entry in before.iostat["bdevs"]}
    limits = {entry["name"]: entry["assigned_rate_limits"] for entry in after.bdevs}
    called = {entry["name"]: _called(entry) for entry in after.bdevs}
    rate = after.iostat["tick_rate"]
    seconds = max(after.at_s - before.at_s, 1e-3)
    shown = []
    for entry in after.iostat["bdevs"]:
        start = earlier.get(entry["name"])
        ops = {name: _grown(start, entry, f"num_{name}_ops") for name in _OPERATIONS}
        waited = sum(_grown(start, entry, f"{name}_latency_ticks") for name in _OPERATIONS)
        count = sum(ops.values())
        shown.append(
            {
                "name": called.get(entry["name"], entry["name"]),
                "read_iops": round(ops["read"] / seconds),
                "write_iops": round(ops["write"] / seconds),
                "read_mib_s": round(_grown(start, entry, "bytes_read") / seconds / _MIB, 1),
                "write_mib_s": round(_grown(start, entry, "bytes_written") / seconds / _MIB, 1),
                "latency_us": round(waited / count / rate * 1e6, 1) if count else 0.0,
                # Little's law: who waits so long, so often, is that many.
                "queue_depth": round(waited / rate / seconds, 1),
                "limits": {
                    name: limit for name, limit in limits.get(entry["name"], {}).items() if limit
                },
            }
        )
    return shown


def _controllers(before: Look, after: Look) -> list[dict[str, Any]]:
    threads = {entry["name"]: entry for entry in after.threads}
    earlier = {entry["name"]: entry for entry in before.threads}
    pollers = {entry["name"]: entry for entry in after.pollers}
    shown = []
    for controller in after.controllers:
        name = controller["ctrlr"]
        thread = threads.get(name)
        queues = pollers.get(name, {"active_pollers": [], "paused_pollers": []})
        shown.append(
            {
                "name": name,
                "bdev": controller["backend_specific"].get("block", {}).get("bdev"),
                "sessions": len(controller["sessions"]),
                "queues": len(queues["active_pollers"]) + len(queues["paused_pollers"]),
                "queues_polled": len(queues["active_pollers"]),
                "busy_percent": _busy_percent(earlier.get(name), thread) if thread else 0.0,
            }
        )
    return shown


def _reactors(before: Look, after: Look) -> list[dict[str, Any]]:
    earlier = {entry["lcore"]: entry for entry in before.reactors}
    return [
        {
            "core": entry["lcore"],
            "busy_percent": _busy_percent(earlier.get(entry["lcore"]), entry),
            "sleeping": entry["in_interrupt"],
        }
        for entry in after.reactors
    ]


def _busy_percent(before: dict[str, Any] | None, after: dict[str, Any]) -> float:
    busy, idle = _grown(before, after, "busy"), _grown(before, after, "idle")
    return round(100 * busy / (busy + idle), 1) if busy + idle else 0.0


# --- how it looks --------------------------------------------------------------------------


def screen_lines(figures: dict[str, Any], rows: int | None = None) -> list[str]:
    """The tables as text, the busiest disks first, in at most so many lines."""
    below = [*_controller_lines(figures["controllers"]), *_reactor_lines(figures["reactors"])]
    disks = sorted(
        figures["disks"], key=lambda disk: disk["read_iops"] + disk["write_iops"], reverse=True
    )
    room = len(disks) if rows is None else max(1, rows - len(below) - 2)
    lines = table_lines(
        ("disk", "read/s", "write/s", "MiB/s read", "written", "latency us", "depth", "limit"),
        [
            (
                disk["name"],
                disk["read_iops"],
                disk["write_iops"],
                disk["read_mib_s"],
                disk["write_mib_s"],
                disk["latency_us"],
                disk["queue_depth"],
                _spell_limits(disk["limits"]),
            )
            for disk in disks[:room]
        ],
    )
    if len(disks) > room:
        lines.append(f"and {len(disks) - room} more")
    return [*lines, *below][:rows]


def _spell_limits(limits: dict[str, int]) -> str:
    return ", ".join(
        f"{start}{limits[name]}{unit}" for name, start, unit in _LIMITS if name in limits
    )


def _controller_lines(controllers: list[dict[str, Any]]) -> list[str]:
    if not controllers:
        return []
    header = ("controller", "disk", "sessions", "queues", "polled", "busy %")
    rows = [
        (
            entry["name"],
            entry["bdev"] or "-",
            entry["sessions"],
            entry["queues"],
            entry["queues_polled"],
            entry["busy_percent"],
        )
        for entry in controllers
    ]
    return ["", *table_lines(header, rows)]


def _reactor_lines(reactors: list[dict[str, Any]]) -> list[str]:
    rows = [
        (entry["core"], entry["busy_percent"], "sleeping" if entry["sleeping"] else "polling")
        for entry in reactors
    ]
    return ["", *table_lines(("reactor", "busy %", "now"), rows)]
