"""vm/lab/lines.py: on which line things of a TOML file stand, however it is written."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.vm.lab.lines import Place, lines_of

TEXT = '''\
# a comment with [no.table] and key = 1
name = "x" # [no]
[pool.big]
file = "a # [disk.x]"
size = "1G"

[ vm . "web.1" ]
a.b = 1
a."c d" = """
x = 2
[y]
"""
disks = [
  "data",  # one ] of them
  { disk = "d", shared = true },
  [1, 2], ]
nets = [{net = "lan", forward = ["1:2", '3:4']}]
day = 1979-05-27T07:32:00Z
'quoted' = \'\'\'
it's''\'\'\'
empty = {}
[[many]]
a = 1
[[many]]
a = 2
[many.below]
x = "\\" # no comment"
'''


def places(values: Any, place: Place = ()) -> Iterator[Place]:
    """Where the reader has something."""
    if place:
        yield place
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*place, key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from places(value, (*place, number))


def test_each_thing_has_the_line_on_which_it_begins() -> None:
    lines = lines_of(TEXT)
    assert {place: lines[place] for place in places(tomllib.loads(TEXT)) if place in lines} == {
        ("name",): 2,
        ("pool", "big"): 3,
        ("pool", "big", "file"): 4,
        ("pool", "big", "size"): 5,
        ("vm", "web.1"): 7,
        ("vm", "web.1", "a"): 8,
        ("vm", "web.1", "a", "b"): 8,
        ("vm", "web.1", "a", "c d"): 9,
        ("vm", "web.1", "disks"): 13,
        ("vm", "web.1", "disks", 0): 14,
        ("vm", "web.1", "disks", 1): 15,
        ("vm", "web.1", "disks", 1, "disk"): 15,
        ("vm", "web.1", "disks", 1, "shared"): 15,
        ("vm", "web.1", "disks", 2): 16,
        ("vm", "web.1", "disks", 2, 0): 16,
        ("vm", "web.1", "disks", 2, 1): 16,
        ("vm", "web.1", "nets"): 17,
        ("vm", "web.1", "nets", 0): 17,
        ("vm", "web.1", "nets", 0, "net"): 17,
        ("vm", "web.1", "nets", 0, "forward"): 17,
        ("vm", "web.1", "nets", 0, "forward", 0): 17,
        ("vm", "web.1", "nets", 0, "forward", 1): 17,
        ("vm", "web.1", "day"): 18,
        ("vm", "web.1", "quoted"): 19,
        ("vm", "web.1", "empty"): 21,
        ("many",): 22,
        ("many", 0): 22,
        ("many", 0, "a"): 23,
        ("many", 1): 24,
        ("many", 1, "a"): 25,
        ("many", 1, "below"): 26,
        ("many", 1, "below", "x"): 27,
    }


@pytest.mark.parametrize("text", ["", "\n\n", "# only this", "a = 1", "a=[\n]\n", "[a]", "a = ''"])
def test_short_texts(text: str) -> None:
    assert len(lines_of(text)) == len(list(places(tomllib.loads(text))))


SPACES = st.sampled_from(["", " ", "\t "])
NEW_LINES = st.sampled_from(["", "\n", " # ]}\"'\n\n"])
SCALARS = st.sampled_from(
    ['"x"', "'\"'", '"""\n[a]\n"""', "'''#\n'''", '"\\""', "12", "true", "1.5e3", "0x1F", "-inf"]
)


@st.composite
def lists(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    elements = [draw(NEW_LINES) + draw(values) + draw(NEW_LINES) for _ in range(draw(LENGTHS))]
    end = draw(st.sampled_from(["", ","])) if elements else ""
    return f"[{','.join(elements)}{end}{draw(NEW_LINES)}]"


@st.composite
def inline_tables(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    pairs = [f"k{number}.a{draw(SPACES)}={draw(SPACES)}{draw(values)}"
             for number in range(draw(LENGTHS))]  # fmt: skip
    return "{" + ", ".join(pairs) + "}"


LENGTHS = st.integers(0, 3)
VALUES = st.recursive(SCALARS, lambda inner: lists(inner) | inline_tables(inner), max_leaves=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(VALUES, st.sampled_from(["\n", " # c\n", "\n\n"])), max_size=4))
def test_whatever_is_in_a_table_is_found_in_its_order(values: list[tuple[str, str]]) -> None:
    text = "".join(f"[t{n}.'x y']\n k{n} = {value}{end}" for n, (value, end) in enumerate(values))
    read = tomllib.loads(text)
    lines = lines_of(text)
    named = [place for place in places(read) if len(place) > 1]
    assert set(named) <= set(lines)
    ordered = [lines[place] for place in named]
    assert ordered == sorted(ordered)
