"""SPDK's recorded answers (tests/data/spdk_answers.json), and in what an answer of ours differs.

A difference has a place, such as ``result/M0/uuid``: entries of a list are named by what
identifies them. Random uuids differ between any two runs; which of ours stands for which of
SPDK's is learnt where the first of them is seen, and must stay so.

Context: tests. Never imports drivebay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DATA: Final = Path(__file__).parents[1] / "data"
# What tells the entries of a list apart, best first.
_IDENTITIES: Final = ("ctrlr", "subsystem", "module", "alias", "name", "thread_id", "lcore")
_NAMES: Final = ("name", "ctrlr", "base_bdev", "base_name", "impl_name", "lvs_name", "bdev_name")


class Missing:
    """What is not there on one side."""

    def __repr__(self) -> str:
        return "(nothing)"


MISSING: Final = Missing()


class Anything:
    """In a rule: any value."""

    def __repr__(self) -> str:
        return "(anything)"


ANYTHING: Final = Anything()


class Number:
    """In a rule: any number."""

    def __repr__(self) -> str:
        return "(a number)"


NUMBER: Final = Number()


def load_calls() -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = json.loads((_DATA / "spdk_answers.json").read_text())["calls"]
    return calls


@dataclass(frozen=True)
class Difference:
    where: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.where}: SPDK {_short(self.theirs)}, ours {_short(self.ours)}"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, Missing) else json.dumps(value)
    return text if len(text) <= 600 else text[:600] + "…"


@dataclass(frozen=True)
class Rule:
    """Differences that are right: at these places, of these values, and why.

    ``where`` is a pattern for "call:place"; ``only``, if any, are the numbers of the calls.
    """

    where: str
    why: str
    theirs: Any = ANYTHING
    ours: Any = ANYTHING
    only: tuple[int, ...] = ()

    def covers(self, number: int, call: str, found: Difference) -> bool:
        return (
            (not self.only or number in self.only)
            and fnmatchcase(f"{call}:{found.where}", self.where)
            and _allows(self.theirs, found.theirs)
            and _allows(self.ours, found.ours)
        )


def _allows(allowed: Any, value: Any) -> bool:
    if isinstance(allowed, Anything):
        return True
    if isinstance(allowed, Number):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(allowed) is type(value) and bool(allowed == value)


@dataclass
class Translation:
    """SPDK's uuids and folders in our run."""

    folder: str
    ours: dict[str, str] = field(default_factory=dict)
    theirs: dict[str, str] = field(default_factory=dict)

    def text(self, recorded: str) -> str:
        """Recorded text as it would read in our run, as far as we know."""
        known = UUID.sub(lambda found: self.ours.get(found[0], found[0]), recorded)
        return known.replace("RUN/", f"{self.folder}/")

    def fixed(self, recorded: str) -> None:
        """Uuids of a request stand for themselves, unless they came from an answer."""
        for uuid in UUID.findall(recorded):
            if uuid not in self.ours:
                self.learn(uuid, uuid)

    def learn(self, theirs: str, ours: str) -> bool:
        """Returns: can this uuid of ours be that one of SPDK's?"""
        same = self.ours.setdefault(theirs, ours) == ours
        return self.theirs.setdefault(ours, theirs) == theirs and same

    def equal(self, theirs: str, ours: str) -> bool:
        if self.text(theirs) == ours:
            return True
        found, mine = UUID.findall(theirs), UUID.findall(ours)
        if not found or UUID.sub("", self.text(theirs)) != UUID.sub("", ours):
            return False
        return all(self.learn(a, b) for a, b in zip(found, mine, strict=True))


def compare(
    theirs: Any, ours: Any, translation: Translation, where: str = "result"
) -> Iterator[Difference]:
    """Every difference of two values, at the smallest place that has one."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys([*theirs, *ours]):
            yield from _member(theirs, ours, key, key, translation, where)
    elif isinstance(theirs, list) and isinstance(ours, list):
        yield from _compare_lists(theirs, ours, translation, where)
    elif isinstance(theirs, str) and isinstance(ours, str):
        if not translation.equal(theirs, ours):
            yield Difference(where, theirs, ours)
    elif type(theirs) is not type(ours) or theirs != ours:
        yield Difference(where, theirs, ours)


def _member(
    theirs: dict[str, Any],
    ours: dict[str, Any],
    their_key: str,
    our_key: str,
    translation: Translation,
    where: str,
) -> Iterator[Difference]:
    place = f"{where}/{their_key}"
    if our_key not in ours:
        yield Difference(place, theirs[their_key], MISSING)
    elif their_key not in theirs:
        yield Difference(place, MISSING, ours[our_key])
    else:
        yield from compare(theirs[their_key], ours[our_key], translation, place)


def _compare_lists(
    theirs: list[Any], ours: list[Any], translation: Translation, where: str
) -> Iterator[Difference]:
    found, mine = _by_identity(theirs), _by_identity(ours)
    if found is None or mine is None:
        if len(theirs) != len(ours):
            yield Difference(where, theirs, ours)
            return
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            yield from compare(a, b, translation, f"{where}/{i}")
        return
    # Names may be uuids that are not known yet: those stand in the same order.
    unknown = [name for name in mine if UUID.fullmatch(name) and name not in translation.theirs]
    partner: dict[str, str] = {}
    for name in found:
        if UUID.fullmatch(name) and name not in translation.ours and unknown:
            partner[name] = unknown.pop(0)
        else:
            partner[name] = translation.text(name)
    for name in found:
        yield from _member(found, mine, name, partner[name], translation, where)
    for name in mine:
        if name not in partner.values():
            yield Difference(f"{where}/{name}", MISSING, mine[name])
    expected = [partner[name] for name in found if partner[name] in mine]
    if expected != [name for name in mine if name in expected]:
        yield Difference(f"{where}/(order)", expected, list(mine))


def _by_identity(items: list[Any]) -> dict[str, Any] | None:
    names = [_identity(item) for item in items]
    if None in names or len(set(names)) != len(names):
        return None
    return {str(name): item for name, item in zip(names, items, strict=True)}


def _identity(item: Any) -> str | None:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        return None
    if "method" in item:
        params = item.get("params") or {}
        return " ".join([item["method"], *(str(params[key]) for key in _NAMES if key in params)])
    return next((str(item[key]) for key in _IDENTITIES if key in item), None)


def compare_answers(
    theirs: dict[str, Any], ours: dict[str, Any], translation: Translation
) -> Iterator[Difference]:
    """Two answers to one request; ``error.data`` is ours alone."""
    found, mine = theirs.get("error"), ours.get("error")
    if mine is not None and mine["code"] == -32601 and (found is None or found["code"] != -32601):
        yield Difference("method", theirs.get("result", found), mine["message"])
    elif (found is None) != (mine is None):
        yield Difference("answer", found or theirs["result"], mine or ours["result"])
    elif found is not None and mine is not None:
        without = {key: value for key, value in mine.items() if key != "data"}
        yield from compare(found, without, translation, "error")
    else:
        yield from compare(theirs["result"], ours["result"], translation)
    if theirs.get("id", 1) != ours.get("id", 1):
        yield Difference("id", theirs.get("id"), ours.get("id"))
