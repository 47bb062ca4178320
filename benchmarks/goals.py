"""What the project wants to reach, as a table: the goal, what was measured, whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from measuring import Row

OURS = "drivebay"
PACKED = ", packed"  # ends the name of a contender on packed rings
OURS_PACKED = OURS + PACKED
GENERATOR = "spdk under bdevperf"


@dataclass(frozen=True)
class Goal:
    """Our figure divided by theirs, or a figure of ours, against a bound."""

    text: str
    wanted: float
    measured: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"met": self.met}

    def line(self) -> str:
        sign = "at least" if self.at_least else "at most"
        verdict = "met" if self.met else "**missed**"
        return f"| {self.text} | {sign} {self.wanted:g} | {self.measured:.3g} | {verdict} |"


# workload, who, at which depths, our throughput as a multiple of theirs
_THROUGHPUT = (
    ("malloc", "spdk", (1,), 1.0),
    ("malloc", "spdk", (32, 128), 1.35),
    ("malloc", "qemu-storage-daemon", (1, 32, 128), 8.0),
    ("malloc", "copy loop", (32, 128), 1 / 1.3),
    ("null", "spdk", (1, 32, 128), 1.0),
    ("null", "qemu-storage-daemon", (1, 32, 128), 1.5),
    ("file hot", "spdk", (1, 32, 128), 1.2),
    ("file hot", "qemu-storage-daemon", (1, 32, 128), 2.0),
    ("file hot", "fio io_uring", (1, 32, 128), 0.7),
    ("file direct", "spdk", (1, 32, 128), 1.0),
    ("file direct", "qemu-storage-daemon", (1, 32, 128), 1.0),
    ("file direct", "fio io_uring", (1, 32, 128), 0.95),
)
# workload, who, which figure, ours as a share of theirs
_COST = (
    ("malloc", "spdk", "busy_ns", 0.75),
    ("null", "spdk", "busy_ns", 1.0),
    ("file direct", "qemu-storage-daemon", "cpu_ns", 1.0),
)
# figure of what rests, its bound, whom it must not exceed, what it is called
_RESTING = (
    ("first_answer_s", 0.4, ("spdk",), "start to the first RPC answer, s"),
    ("resident_mib", 64.0, ("spdk",), "memory with 100 disks and no session, MiB"),
    (
        "idle_percent",
        0.5,
        ("spdk", "qemu-storage-daemon"),
        "processor with 100 idle sessions, % of a core",
    ),
)


def goals(rows: Sequence[Row], resting: dict[str, dict[str, float]]) -> list[Goal]:
    """All goals about which something was measured."""
    return [*_generator(rows), *_ratios(rows), *_costs(rows), *_rest(resting)]


def _find(rows: Iterable[Row], target: str, workload: str) -> dict[tuple[str, int], Row]:
    return {(r.rw, r.depth): r for r in rows if r.target == target and r.workload == workload}


def _generator(rows: Sequence[Row]) -> Iterator[Goal]:
    """Ratios count only if our load generator is as quick as SPDK's."""
    for workload in ("null", "malloc"):
        theirs = _find(rows, GENERATOR, workload)
        for (rw, depth), row in _find(rows, "spdk", workload).items():
            if (rw, depth) in theirs:
                text = f"our load against bdevperf's on spdk's {workload}, {rw}, depth {depth}"
                yield Goal(text, 0.95, row.median / theirs[rw, depth].median)


def _ratios(rows: Sequence[Row]) -> Iterator[Goal]:
    for workload, who, depths, wanted in _THROUGHPUT:
        theirs = _find(rows, who, workload)
        for (rw, depth), row in _find(rows, OURS, workload).items():
            if depth in depths and (rw, depth) in theirs:
                text = f"{workload}, {rw}, depth {depth}, throughput against {who}"
                yield Goal(text, round(wanted, 3), row.median / theirs[rw, depth].median)


def _costs(rows: Sequence[Row]) -> Iterator[Goal]:
    for workload, who, figure, wanted in _COST:
        theirs = _find(rows, who, workload)
        for key, row in _find(rows, OURS, workload).items():
            mine = row.figure(figure, at_rate=True)
            other = theirs[key].figure(figure, at_rate=True) if key in theirs else None
            if mine is not None and other:
                text = f"{workload}, {row.rw}, time for each request against {who}"
                yield Goal(text, wanted, mine / other, at_least=False)
    for row in _find(rows, OURS, "null").values():
        if row.depth == 128 and (busy := row.figure("busy_ns")) is not None:
            yield Goal(f"null, {row.rw}, depth 128, ns for each request", 100, busy, at_least=False)


def _rest(resting: dict[str, dict[str, float]]) -> Iterator[Goal]:
    ours = resting.get(OURS, {})
    for key, bound, whom, text in _RESTING:
        if key in ours:
            yield Goal(text, bound, ours[key], at_least=False)
        for who in whom:
            theirs = resting.get(who, {}).get(key)
            if key in ours and theirs is not None:
                yield Goal(f"{text}, against {who}", theirs, ours[key], at_least=False)
    if "among_idle" in ours:
        yield Goal(
            "one busy disk among 256 idle ones, share of its speed", 0.95, ours["among_idle"]
        )


def table(found: Sequence[Goal]) -> str:
    head = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *(goal.line() for goal in found)])
