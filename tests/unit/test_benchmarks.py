"""The benchmarks compute what they say: turns, costs, ratios, goals, and reports of others.

Nothing here looks at how fast anything is.
"""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import chart
import contenders
import goals
import latency
import measuring
import pytest
import report
import scale
import spdk_peer
import targets
from contenders import Case, Sample
from measuring import Row

from drivebay.errors import DrivebayError, HostError

CASE = Case("malloc", "randread", 32)


class FakeTarget(targets.Target):
    """A process that only notes whether it runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ["x"], Path("/none/log"))
        self.runs = True

    def pause(self) -> None:
        self.runs = False

    def resume(self) -> None:
        self.runs = True


class FakeContender:
    """Takes all cases; its speeds are given."""

    def __init__(self, name: str, speeds: Iterator[float], all_targets: list[FakeTarget]) -> None:
        self.name = name
        self.target = next((t for t in all_targets if t.name == name), None)
        self.speeds = speeds
        self.all_targets = all_targets
        self.log: list[tuple[str, float | None]] = []

    def takes(self, case: Case) -> bool:
        return case.workload == "malloc"

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample:
        running = [target.name for target in self.all_targets if target.runs]
        assert running == ([self.name] if self.target else [])
        self.log.append((case.rw, rate))
        cpu = None if self.target is None else 500.0
        return Sample(next(self.speeds), cpu_ns=cpu)


def row(target: str, iops: float, case: Case = CASE, **figures: Any) -> Row:
    at_rate = [Sample(iops / 2, **figures)] if figures else []
    return Row(target, case, [Sample(iops, agreed=f"ring of {target}")], at_rate, iops / 2)


def test_examples_in_the_documentation() -> None:
    found = doctest.testmod(measuring)
    assert found.attempted
    assert not found.failed


def test_contenders_take_turns_and_run_alone() -> None:
    both = [FakeTarget("a"), FakeTarget("b")]
    a = FakeContender("a", iter([100.0, 300.0, 200.0, 50.0, 50.0, 50.0]), both)
    b = FakeContender("b", iter([400.0, 500.0, 600.0, 50.0, 50.0, 50.0]), both)
    limit = FakeContender("limit", iter([900.0, 900.0, 900.0]), both)
    shown: list[Row] = []
    rows = measuring.measure(
        [CASE, Case("null", "randread", 32)],
        [a, b, limit],
        both,
        repeat=3,
        seconds=1.0,
        show=shown.append,
    )
    assert rows == shown
    assert [(found.target, found.median) for found in rows] == [
        ("a", 200.0),
        ("b", 500.0),
        ("limit", 900.0),
    ]
    # Cost is measured at half of the slowest target's speed; the limit has none.
    assert a.log == b.log == [("randread", None)] * 3 + [("randread", 100.0)] * 3
    assert limit.log == [("randread", None)] * 3
    assert rows[0].figure("cpu_ns", at_rate=True) == 500.0
    assert rows[2].figure("cpu_ns") is None
    assert rows[0].as_json()["rate"] == 100


@pytest.mark.parametrize(
    ("ours", "theirs", "met"), [(1350.0, 1000.0, True), (1349.0, 1000.0, False)]
)
def test_throughput_goals(ours: float, theirs: float, met: bool) -> None:
    [goal] = goals.goals([row("drivebay", ours), row("spdk", theirs)], {})
    assert "malloc, randread, depth 32, throughput against spdk" in goal.text
    assert goal.met is met
    assert ("**missed**" in goals.table([goal])) is not met


def test_cost_goals_compare_busy_time_with_spdk() -> None:
    rows = [row("drivebay", 9e6, busy_ns=70.0), row("spdk", 1e6, busy_ns=100.0)]
    found = {goal.text: goal for goal in goals.goals(rows, {})}
    cost = found["malloc, randread, time for each request against spdk"]
    assert (cost.measured, cost.wanted, cost.met) == (0.7, 0.75, True)


def test_ratios_count_only_with_a_quick_load_generator() -> None:
    rows = [row("spdk", 900.0), row("spdk under bdevperf", 1000.0)]
    [goal] = goals.goals(rows, {})
    assert goal.wanted == 0.95
    assert not goal.met


def test_goals_of_what_rests() -> None:
    resting = {
        "drivebay": {"first_answer_s": 0.3, "resident_mib": 70.0, "idle_percent": 0.1,
                     "among_idle": 0.96},
        "spdk": {"first_answer_s": 0.2, "resident_mib": 700.0, "idle_percent": 100.0},
        "qemu-storage-daemon": {"resident_mib": 9.0, "idle_percent": 0.1},
    }  # fmt: skip
    found = {goal.text: goal.met for goal in goals.goals([], resting)}
    assert found == {
        "start to the first RPC answer, s": True,
        "start to the first RPC answer, s, against spdk": False,
        "memory with 100 disks and no session, MiB": False,
        "memory with 100 disks and no session, MiB, against spdk": True,
        "processor with 100 idle sessions, % of a core": True,
        "processor with 100 idle sessions, % of a core, against spdk": True,
        "processor with 100 idle sessions, % of a core, against qemu-storage-daemon": True,
        "one busy disk among 256 idle ones, share of its speed": True,
    }


def test_tables_and_files(tmp_path: Path) -> None:
    rows = [row("drivebay", 2e6, cpu_ns=90.0, busy_ns=80.0), row("spdk", 1e6, cpu_ns=100.0)]
    text = report.ratio_tables(rows)
    assert (
        "| malloc, randread | 32 | 2,000 (2,000 to 2,000) | 1,000 (1,000 to 1,000) | 2.00 |" in text
    )
    assert "90 ns, 80 busy / 100 ns" in text
    packed = [row("drivebay, packed", 3e6), row("spdk, packed", 2e6)]
    assert "| 3,000 (3,000 to 3,000) | 2,000 (2,000 to 2,000) | 1.50 |" in report.ratio_tables(
        packed
    )
    assert "spdk, malloc: ring of spdk" in report.agreements(rows)
    path = report.save(tmp_path / "new", "x", {"rows": [one.as_json() for one in rows]})
    assert json.loads(path.read_text())["rows"][0]["samples"][0]["iops"] == 2e6
    chart.write_chart(path.with_suffix(".svg"), rows)
    assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_a_chart_has_room_for_any_number_of_peers(tmp_path: Path) -> None:
    case = Case("null", "randread", 1)
    rows = [Row(f"peer{number}", case, [Sample(1000.0 * number)]) for number in range(1, 25)]
    chart.write_chart(tmp_path / "many.svg", rows)
    drawn = (tmp_path / "many.svg").read_text()
    assert all(f">peer{number}<" in drawn for number in range(1, 25))


def test_bdevperfs_total_is_read() -> None:
    printed = (
        " Job: Virtio0 (Core Mask 0x2, workload: randread, depth: 32, IO size: 4096)\n"
        " Virtio0 : 3.00 1196123.50 4672.36 0.00 0.00 26.7 1.0 90.1\n"
        " =================\n"
        " Total : 1196123.50 4672.36 0.00 0.00 26.7 1.0 90.1\n"
    )
    assert spdk_peer.parse_bdevperf(printed) == 1196123.5
    with pytest.raises(DrivebayError, match="no total"):
        spdk_peer.parse_bdevperf("nothing")


def test_missing_huge_pages_are_said_with_the_command() -> None:
    meminfo = (
        "MemTotal: 1 kB\nHugePages_Total: 10\nHugePages_Free:      8\nHugepagesize:  2048 kB\n"
    )
    spdk_peer.check_hugepages(16, meminfo)
    with pytest.raises(HostError, match=r"needs 768 MiB .* there are 16") as caught:
        spdk_peer.check_hugepages(768, meminfo)
    assert caught.value.hint == "as root: echo 384 > /proc/sys/vm/nr_hugepages"


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="not a program"):
        spdk_peer.spdk_vhost(tmp_path / "vhost", tmp_path, False)


def test_fios_report_is_read() -> None:
    quiet = {"iops": 0, "total_ios": 0, "clat_ns": {}}
    percentile = {"50.000000": 2000, "99.000000": 3000, "99.900000": 4000}
    read = {"iops": 500.0, "total_ios": 1000, "clat_ns": {"percentile": percentile}}
    job = {"read": read, "write": quiet, "usr_cpu": 10.0, "sys_cpu": 40.0, "job_runtime": 2000}
    sample = contenders.parse_fio("note: something\n" + json.dumps({"jobs": [job]}))
    assert (sample.iops, sample.p50_us, sample.p99_9_us) == (500.0, 2.0, 4.0)
    assert sample.cpu_ns == 1e6  # half of 2 s for 1,000 requests
    with pytest.raises(DrivebayError, match="cannot be read"):
        contenders.parse_fio("nothing")


def test_fio_leaves_the_cache_and_opens_as_the_case_says() -> None:
    hot = contenders.fio_command(Path("/f"), Case("file hot", "randread", 1), 2.0)
    direct = contenders.fio_command(Path("/f"), Case("file direct", "randwrite", 128), 2.0)
    assert {"--direct=0", "--invalidate=0", "--iodepth=1", "--rw=randread"} <= set(hot)
    assert {"--direct=1", "--iodepth=128", "--rw=randwrite"} <= set(direct)


def test_the_copy_loop_copies(tmp_path: Path) -> None:
    loop = contenders.build_copy_loop(tmp_path)
    disk = bytearray(b"\xaa" * 4096 + b"\xbb" * 4096)
    guest = bytearray(4 * 4096)
    assert loop(disk, guest, 2, False, 0.01) > 0
    for start in (0, 4096):
        assert guest[start : start + 4096] in (disk[:4096], disk[4096:])
    assert not any(guest[2 * 4096 :]), "only as many buffers as there are requests"
    loop(disk, bytearray(b"\xcc" * 4096), 1, True, 0.01)
    assert set(disk) == {0xCC}
    with pytest.raises(ValueError, match="5 buffers do not fit"):
        loop(disk, guest, 5, False, 0.01)


def test_peers_are_described_in_one_word(tmp_path: Path) -> None:
    peer = targets.parse_peer("other,null=/a,file hot=/b,command=prog -x 1,2", tmp_path)
    assert peer.command == ["prog", "-x", "1,2"]
    assert peer.sockets == {"null": Path("/a"), "file hot": Path("/b")}
    assert not targets.parse_peer("other,null=/a", tmp_path).command
    for wrong in ("other", "other,floppy=/a"):
        with pytest.raises(SystemExit, match="the workloads are"):
            targets.parse_peer(wrong, tmp_path)


def test_the_storage_daemons_command(tmp_path: Path) -> None:
    files: dict[str, Any] = {"file direct": Path("/f")}
    nodes = targets.storage_daemon_nodes(["null", "file direct"], files)
    command = targets.storage_daemon(tmp_path, nodes).command
    assert any("null-co" in word and "node-name=n0" in word for word in command)
    assert any("filename=/f,cache.direct=on,node-name=n1" in word for word in command)


def point(reactors: int, controllers: int, iops: float, busy_ns: float) -> scale.Point:
    found = scale.Point(reactors, controllers, FakeTarget("x"))
    sample = Sample(iops, cpu_ns=2 * busy_ns, busy_ns=busy_ns)
    found.samples = {scale.ONE_BUSY: [sample], scale.ALL_BUSY: [sample]}
    found.idle_percent = [0.25]
    return found


def test_what_an_idle_controller_costs() -> None:
    points = [point(1, 1, 2e6, 100.0), point(1, 11, 1e6, 120.0), point(2, 1, 3e6, 90.0)]
    one, two = scale.flatness(points)
    assert one == {"reactors": 1, "speed_kept": 0.5, "ns_each_idle_controller": 2.0}
    assert two["speed_kept"] == 1.0
    assert "| 1 | 11 | 1,000 (1,000 to 1,000) | 120 / 240 |" in scale.table(points)
    assert points[0].as_json()["modes"]["one busy"][0]["iops"] == 2e6


def test_lines_are_drawn(tmp_path: Path) -> None:
    points = [point(1, 1, 2e6, 100.0), point(1, 11, 1e6, 120.0)]
    chart.write_lines(tmp_path / "a.svg", "controllers", scale.panels(points))
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    lines = [element.get("points") for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 4  # one busy and all busy, speed and cost
    assert all(line and len(line.split()) == 2 for line in lines)


def test_a_packed_ring_is_a_disk_of_its_own() -> None:
    target = FakeTarget("x")
    served = contenders.Served(target, suffix=", packed", packed=True)
    target.sockets["malloc"] = Path("/a")
    assert served.name == "x, packed"
    assert not served.takes(CASE)
    target.sockets["malloc packed"] = Path("/b")
    assert served.takes(CASE)


@pytest.mark.parametrize(("p50", "met"), [(20.0, True), (60.0, True), (80.0, False)])
def test_our_polling_costs_at_most_one_wake_up(p50: float, met: bool) -> None:
    times = {"drivebay": p50, latency.ALWAYS: 10.0, latency.NEVER: 60.0, "spdk": 1.0}
    lines = [
        latency.Line(name, "sleeping", "null", "randread", 500, [Sample(500.0, p50_us=time)])
        for name, time in times.items()
    ]
    [goal] = latency.wake_ups(lines)
    assert goal.text == "null, randread, 500/s, sleeping client: p50, us"
    assert goal.wanted == 63.0
    assert goal.met is met


def test_a_line_of_latencies() -> None:
    samples = [
        Sample(1.0, p50_us=p50, p99_us=9.0, p99_9_us=99.0, cpu_ns=500.0) for p50 in (3.0, 1.0, 2.0)
    ]
    line = latency.Line("x", "polling", "null", "randread", 0, samples)
    expected = "| null | randread | at once | polling | x | 2.0 | 9.0 | 99.0 | 500 |"
    assert line.text() == expected
    assert line.text().count("|") == latency.HEAD.splitlines()[0].count("|")
    assert len(line.as_json()["samples"]) == 3
