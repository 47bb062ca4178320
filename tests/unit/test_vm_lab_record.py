"""vm/lab/record.py: what a lab has made is written before it is made, and read with care."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from drivebay.errors import HostError, StateError
from drivebay.vm.lab.record import Labs, Record, Thing

DISK = Thing("disk", "data-1", bdev="p/l-data-1")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    labs = Labs(tmp_path)
    record = Record(labs.path("l"), "/x/l.toml")
    record.begin(DISK)
    assert labs.load("l") == record
    assert stat.S_IMODE(labs.path("l").stat().st_mode) == 0o600
    record.finish(DISK)
    found = labs.load("l")
    assert found is not None
    assert found.find("disk", "data-1") == Thing("disk", "data-1", "p/l-data-1", finished=True)
    found.forget("disk", "data-1")
    found.forget("disk", "data-1")
    assert labs.load("l") == Record(labs.path("l"), "/x/l.toml")
    assert (labs.names(), labs.of_file(Path("/x/l.toml"))) == (["l"], "l")
    labs.delete(found)
    assert (labs.load("l"), labs.of_file(Path("/x/l.toml"))) == (None, None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"file": "f"}', '{"file": "f", "things": [1]}',
     '{"file": "f", "things": [{"kind": "disk"}]}',
     '{"file": "f", "things": [{"kind": "other", "name": "x"}]}',
     '{"file": "f", "things": [{"kind": "disk", "name": 1}]}',
     '{"file": "f", "things": [{"kind": "disk", "name": "x", "finished": 1}]}',
     '{"file": "f", "things": [{"kind": "disk", "name": "x", "more": 1}]}'],
)  # fmt: skip
def test_a_record_that_is_none_is_refused_and_breaks_no_other_lab(
    tmp_path: Path, text: str
) -> None:
    labs = Labs(tmp_path)
    labs.path("a").write_text(text)
    with pytest.raises(StateError, match="the record of lab 'a', can't be understood") as caught:
        labs.load("a")
    assert caught.value.hint is not None
    labs.path("b").write_text(json.dumps({"file": "/b.toml", "things": []}))
    assert labs.of_file(Path("/b.toml")) == "b"


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    labs = Labs(tmp_path)
    labs.path("a").mkdir()
    with pytest.raises(HostError, match="can't read .*, the record of lab 'a'"):
        labs.load("a")


@pytest.mark.parametrize("content", [None, b"", b"\0" * 10, b"data"])
def test_only_an_unwritten_file_of_ours_is_removed(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    Thing("pool", "p", file=str(path)).remove_unwritten_file()
    assert path.exists() == (content is not None)
    Thing("pool", "p", file=str(path), made_file=True).remove_unwritten_file()
    assert path.exists() == bool(content)
