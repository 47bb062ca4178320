"""The benchmarks run from start to end, as small as can be; what they measure is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LIMIT_S = 120


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark; it leaves no files in memory behind."""
    with subprocess.Popen(
        [sys.executable, str(BENCHMARKS / script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert not list(Path("/dev/shm").glob(f"drivebay-bench-{process.pid}-*"))
    return subprocess.CompletedProcess(script, process.returncode, output, errors)


@pytest.mark.needs_qemu
def test_targets_side_by_side(tmp_path: Path) -> None:
    done = run(
        "vhost_blk.py",
        *("--quick", "--workloads", "null", "malloc", "--rw", "randread", "--depths", "32"),
        *("--out", str(tmp_path), "--disk", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "vhost_blk.json").read_text())
    rows = {(row["target"], row["workload"]): row for row in found["rows"]}
    assert set(rows) >= {
        ("drivebay", "null"),
        ("qemu-storage-daemon", "null"),
        ("drivebay", "malloc"),
        ("qemu-storage-daemon", "malloc"),
        ("copy loop", "malloc"),
    }
    for row in found["rows"]:
        assert all(sample["iops"] > 0 for sample in row["samples"])
    ours = rows["drivebay", "malloc"]
    assert "split ring" in ours["agreed"]
    assert "write-back" in ours["agreed"]
    assert {"iops", "p50_us", "p99_9_us", "cpu_ns", "busy_ns"} <= set(ours["at_rate"][0])
    assert set(found["resting"]) == {"drivebay", "qemu-storage-daemon"}
    assert (tmp_path / "vhost_blk.svg").read_text().startswith("<svg")
    assert "against qemu-storage-daemon" in done.stdout


def test_a_peer_that_is_not_built_is_said(tmp_path: Path) -> None:
    done = run("vhost_blk.py", "--quick", "--workloads", "null", "--spdk", str(tmp_path / "vhost"))
    assert done.returncode == 1
    assert "is not a program" in done.stderr


def test_scale(tmp_path: Path) -> None:
    done = run("scale.py", "--quick", "--counts", "1", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    places = [(point["reactors"], point["controllers"]) for point in found["points"]]
    assert places == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for point in found["points"]:
        for mode in ("one busy", "all busy"):
            assert point["modes"][mode][0]["iops"] > 0
    assert [one["reactors"] for one in found["flatness"]] == [1, 2]
    assert (tmp_path / "scale.svg").read_text().startswith("<svg")


def test_latency(tmp_path: Path) -> None:
    words = ("--quick", "--workloads", "null", "--rates", "0", "500", "--out", str(tmp_path))
    done = run("latency.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "latency.json").read_text())
    seen = {(line["target"], line["client"], line["rate"]) for line in found["lines"]}
    for target in ("drivebay", "drivebay, always polling", "drivebay, never polling"):
        for client in ("polling", "sleeping"):
            assert {(target, client, 0), (target, client, 500)} <= seen
    for line in found["lines"]:
        sample = line["samples"][0]
        assert 0 < sample["p50_us"] <= sample["p99_us"] <= sample["p99_9_us"]
    assert len(found["goals"]) == 4


def test_stacks(tmp_path: Path) -> None:
    done = run("bdev_stack.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bdev_stack.json").read_text())
    rows = {(row["stack"], row["rw"]): row for row in found["rows"]}
    for stack in ("malloc", "passthru x5"):
        for rw in ("randread", "randwrite"):
            assert rows[stack, rw]["samples"][0]["iops"] > 0
    assert len(found["goals"]) >= len(rows) - 2
    assert "percent of the bare disk's throughput lost" in done.stdout


def test_limits(tmp_path: Path) -> None:
    words = ("--quick", "--depths", "32", "--queues", "2", "--out", str(tmp_path))
    done = run("limits.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "limits.json").read_text())
    names = [line["limit"] for line in found["lines"]]
    assert len(set(names)) == len(names) == 4
    for line in found["lines"]:
        assert 0 < line["ratios"][0] < 1.5
    assert all(iops > 0 for iops in found["shares"][0])
    assert len(found["goals"]) == 5
