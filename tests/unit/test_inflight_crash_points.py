"""A kill between any two instructions: what was answered stays so, all else is done once.

vhost-user, "Inflight I/O tracking". The device runs one instruction at a time; whenever the
ring or the region has changed, another device goes on from a copy of both.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fakes.crash_scene import go_on, load, play

DATA = Path(__file__).parent.parent / "data"


# Starts from which an index, or a wrap counter, wraps on the way. Sanitizers make of each step
# fifteen, and look for another kind of fault: one start of each kind of ring is enough for them.
STARTS = [(False, 65533), (True, 6)]
if "libasan" not in os.environ.get("LD_PRELOAD", ""):
    STARTS += [(False, 0), (True, 0), (True, 8), (True, 13)]


@pytest.mark.parametrize(("packed", "start"), STARTS)
def test_every_crash_point(packed: bool, start: int) -> None:
    seen = set()
    for number, cut in enumerate(play(packed=packed, start=start)):
        seen.add(len(cut.taken))
        try:
            go_on(cut, packed=packed, start=start)
        except AssertionError as error:
            raise AssertionError(f"cut {number}: {error}; {cut}") from error
    assert len(seen) > 2, "the scene was cut too early to mean anything"


@pytest.mark.parametrize("kind", ["split", "packed"])
def test_what_an_earlier_version_left_is_taken_over(kind: str) -> None:
    cut, packed, start = load(DATA / f"inflight_{kind}.json")
    assert packed == (kind == "packed")
    go_on(cut, packed=packed, start=start)
