"""Repetitions in turns, and what is quoted of them.

The speed of a machine drifts, so within each repetition every contender has its turn, and
what is compared ran within seconds of each other. Quoted is the median, with the spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from contenders import Case, Contender, Sample
from targets import Target, alone

COST_DEPTH = 32  # cost is measured at this depth


@dataclass
class Row:
    """All repetitions of one contender in one case."""

    target: str
    case: Case
    samples: list[Sample] = field(default_factory=list)
    at_rate: list[Sample] = field(default_factory=list)  # of a rate that everybody reaches
    rate: float | None = None

    @property
    def workload(self) -> str:
        return self.case.workload

    @property
    def rw(self) -> str:
        return self.case.rw

    @property
    def depth(self) -> int:
        return self.case.depth

    @property
    def iops(self) -> list[float]:
        return [sample.iops for sample in self.samples]

    @property
    def median(self) -> float:
        return statistics.median(self.iops)

    @property
    def agreed(self) -> str:
        return self.samples[-1].agreed

    def figure(self, name: str, *, at_rate: bool = False) -> float | None:
        """The median of one of Sample's figures; None if it has none."""
        samples = self.at_rate if at_rate else self.samples
        found = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return statistics.median(found) if found else None

    def as_json(self) -> dict[str, Any]:
        def rounded(sample: Sample) -> dict[str, Any]:
            values = {k: v for k, v in vars(sample).items() if v not in (None, "")}
            return {k: round(v, 2) for k, v in values.items() if k != "agreed"}

        return {
            "target": self.target,
            "workload": self.workload,
            "rw": self.rw,
            "depth": self.depth,
            "agreed": self.agreed,
            "samples": [rounded(sample) for sample in self.samples],
            "rate": None if self.rate is None else round(self.rate),
            "at_rate": [rounded(sample) for sample in self.at_rate],
        }


def in_turns(
    case: Case,
    contenders: Sequence[Contender],
    targets: Sequence[Target],
    *,
    repeat: int,
    seconds: float,
    rate: float | None = None,
) -> dict[str, list[Sample]]:
    """Every contender that takes the case, ``repeat`` times; nobody else runs meanwhile."""
    taking = [contender for contender in contenders if contender.takes(case)]
    found: dict[str, list[Sample]] = {contender.name: [] for contender in taking}
    for _ in range(repeat):
        for contender in taking:
            with alone(contender.target, targets):
                found[contender.name].append(contender.run(case, seconds, rate))
    return found


def measure(
    cases: Iterable[Case],
    contenders: Sequence[Contender],
    targets: Sequence[Target],
    *,
    repeat: int,
    seconds: float,
    show: Callable[[Row], None],
) -> list[Row]:
    """A row for each case and contender; where depth is COST_DEPTH with its cost."""
    rows: list[Row] = []
    for case in cases:
        found = in_turns(case, contenders, targets, repeat=repeat, seconds=seconds)
        fresh = {name: Row(name, case, samples) for name, samples in found.items()}
        if case.depth == COST_DEPTH:
            served = [c for c in contenders if c.target is not None and _tells_cost(fresh, c)]
            rate = 0.5 * min((fresh[c.name].median for c in served), default=0.0)
            costs = in_turns(case, served, targets, repeat=repeat, seconds=seconds, rate=rate)
            for name, samples in costs.items():
                fresh[name].at_rate, fresh[name].rate = samples, rate
        for row in fresh.values():
            show(row)
        rows += fresh.values()
    return rows


def _tells_cost(fresh: dict[str, Row], contender: Contender) -> bool:
    return contender.name in fresh and fresh[contender.name].figure("cpu_ns") is not None


def spread(values: Sequence[float], scale: float = 1000.0) -> str:
    """The median, and from where to where.

    >>> spread([1_000, 3_000, 2_000])
    '2 (1 to 3)'
    """
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = 0 if middle >= 10 * scale or scale == 1 or middle >= scale else 1
    return (
        f"{middle / scale:,.{digits}f} ({least / scale:,.{digits}f} to {most / scale:,.{digits}f})"
    )
