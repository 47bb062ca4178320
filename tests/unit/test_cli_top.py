"""`drivebay target top`: figures from two looks, and the screen that they make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivebay.cli.top import Look, compare, screen_lines
from tests.fakes.process import TargetProcess

RATE = 2_000_000_000


def disk(name: str, reads: int, ticks: int, **limits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its iostat and its entry of bdev_get_bdevs."""
    counted: dict[str, Any] = {"name": name}
    for operation, moved in (("read", "read"), ("write", "written"), ("unmap", "unmapped")):
        ops = reads if operation == "read" else 0
        counted |= {
            f"num_{operation}_ops": ops,
            f"bytes_{moved}": ops << 20,
            f"{operation}_latency_ticks": ticks if ops else 0,
        }
    return counted, {"name": name, "assigned_rate_limits": {"r_mbytes_per_sec": 0, **limits}}


def look(at_s: float, *disks: tuple[dict[str, Any], dict[str, Any]], busy: int = 0) -> Look:
    return Look(
        at_s=at_s,
        iostat={"tick_rate": RATE, "bdevs": [counted for counted, _ in disks]},
        bdevs=[shown for _, shown in disks],
        controllers=[
            {"ctrlr": "v0", "sessions": [{}], "backend_specific": {"block": {"bdev": "D0"}}}
        ],
        threads=[{"name": "v0", "busy": busy, "idle": 4 * busy}],
        pollers=[{"name": "v0", "active_pollers": [{}], "paused_pollers": [{}, {}]}],
        reactors=[{"lcore": 3, "busy": busy, "idle": busy, "in_interrupt": True}],
    )


def test_a_volume_is_called_by_its_alias() -> None:
    counted, shown = disk("f0a5bc95", 0, 0)
    shown |= {"uuid": "f0a5bc95", "aliases": ["f0a5bc95", "fast/web"]}
    seen = look(10.0, (counted, shown))
    assert [entry["name"] for entry in compare(seen, seen)["disks"]] == ["fast/web"]


def test_figures_are_those_of_the_time_between() -> None:
    before = look(10.0, disk("D0", 1000, 0), busy=100)
    after = look(12.0, disk("D0", 3000, 4_000_000_000, rw_ios_per_sec=1000), busy=300)
    assert compare(before, after) == {
        "seconds": 2.0,
        "disks": [
            {
                "name": "D0",
                "read_iops": 1000,
                "write_iops": 0,
                "read_mib_s": 1000.0,
                "write_mib_s": 0.0,
                "latency_us": 1000.0,
                "queue_depth": 1.0,
                "limits": {"rw_ios_per_sec": 1000},
            }
        ],
        "controllers": [
            {
                "name": "v0",
                "bdev": "D0",
                "sessions": 1,
                "queues": 3,
                "queues_polled": 1,
                "busy_percent": 20.0,
            }
        ],
        "reactors": [{"core": 3, "busy_percent": 50.0, "sleeping": True}],
    }


def test_a_disk_that_is_new_or_was_reset_starts_at_zero() -> None:
    before = look(1.0, disk("D0", 1000, 10))
    after = look(2.0, disk("D0", 10, 0), disk("D1", 20, 0))
    assert [entry["read_iops"] for entry in compare(before, after)["disks"]] == [10, 20]


def test_the_screen_has_the_busiest_first_and_says_what_is_left_out() -> None:
    disks = [disk(f"D{number}", number, 0, r_mbytes_per_sec=number) for number in range(30)]
    figures = compare(look(1.0), look(2.0, *disks))
    lines = screen_lines(figures)
    assert len(lines) == 31 + 6
    assert lines[1].split()[:2] == ["D29", "29"]
    assert lines[1].endswith("r 29 MiB/s")
    fitting = screen_lines(figures, rows=20)
    assert len(fitting) == 20
    assert fitting[13] == "and 18 more"
    assert [line.split()[0] for line in (fitting[12], fitting[-1])] == ["D18", "3"]
    assert len(screen_lines(figures, rows=4)) == 4


def test_no_disks_and_no_controllers_are_fine() -> None:
    empty = look(2.0)._replace(controllers=[], threads=[], pollers=[])
    assert screen_lines(compare(empty, empty))[-1].split() == ["3", "0.0", "sleeping"]


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        process.malloc("Malloc7")
        process.rpc("bdev_set_qos_limit", name="Malloc7", rw_ios_per_sec=3000)
        yield process
        assert process.stop() == 0


def top(
    target: TargetProcess, *options: str, stdout: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "drivebay", "target", "top", "-s", str(target.rpc_path)]
    return subprocess.Popen([*command, *options], stdout=stdout)


def test_json_is_one_object_a_second_until_it_is_interrupted(target: TargetProcess) -> None:
    process = top(target, "--json")
    assert process.stdout is not None
    with process.stdout as lines:
        shown = json.loads(lines.readline())
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert [(disk["name"], disk["limits"]) for disk in shown["disks"]] == [
        ("Malloc7", {"rw_ios_per_sec": 3000})
    ]
    assert [reactor["core"] for reactor in shown["reactors"]] == [0]


def test_a_terminal_is_given_back_as_it_was(target: TargetProcess) -> None:
    ours, theirs = os.openpty()
    process = top(target, stdout=theirs)
    os.close(theirs)
    seen = b""
    while b"3000/s" not in seen:
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    while not seen.endswith(b"\x1b[?25h\x1b[?1049l"):
        seen += os.read(ours, 4096)
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l\x1b[H")


def test_once_shows_the_tables(target: TargetProcess) -> None:
    process = top(target, "--once")
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert [line.split()[:1] for line in shown.decode().splitlines()] == [
        ["disk"], ["Malloc7"], [], ["reactor"], ["0"],
    ]  # fmt: skip
